"""Tensors to bytes and back.

A tensor travels as a `TensorSpec` in the message header and its raw little-endian bytes in the payload. The
spec is checked before one byte of the payload is read, so that no peer can make another allocate more than it
allows. `codec` names how the values were written; the receiver restores `dtype`.

==========  ===============  =================================================================================
codec       bytes per value  what comes back
==========  ===============  =================================================================================
`none`      the dtype's own  every bit
`bfloat16`  2                within 2^-8 of each value; what is beyond its range travels as `none`
`float16`   2                within 2^-11 of each value, or 2^-25; beyond its range as above
`int8`      1 + 1/32         within 1/127 of the largest magnitude of its block, or 2^-127 (2^-25 for float16)
==========  ===============  =================================================================================

`int8` is MXINT8 of the Open Compute Project's Microscaling formats (OCP MX v1.0, 5.2 and 6.3): blocks of 32
values along the last dimension share a scale that is a power of two, one byte. So nothing but exact
arithmetic is involved: every machine encodes alike, and what was decoded once is encoded to the same bytes
again, in every dtype. No block reaches over two tokens, so a token's values do not depend on its neighbours'.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
import torch

DTypeName = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
CodecName = Literal["none", "float16", "bfloat16", "int8"]
LossyCodecName = Literal["float16", "bfloat16", "int8"]

BLOCK = 32
"""Values that share a scale in `int8`."""
_NOT_FINITE = -128
"""The scale of a block with NaN or infinity: all its values come back as NaN."""
_EXPONENTS = {torch.float32: (-126, 121), torch.bfloat16: (-126, 121), torch.float16: (-24, 9)}
"""The powers of two in `int8`: with them 127 times the largest is finite, and the smallest is a value."""

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
_NAMES: dict[torch.dtype, DTypeName] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.uint8: "uint8",
}


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What is needed to read a tensor's bytes: shape (at most 4 sizes), dtype, codec."""

    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=2**31)], ...], msgspec.Meta(max_length=4)]
    dtype: DTypeName
    codec: CodecName = "none"

    @property
    def nbytes(self) -> int:
        """Bytes of this tensor in the payload."""
        if self.codec == "int8":
            return math.prod(self.shape) + math.prod(self.shape[:-1]) * _blocks(self.shape)
        wire = self.dtype if self.codec == "none" else self.codec
        return math.prod(self.shape) * _DTYPES[wire].itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `decode` returns."""
        return _DTYPES[self.dtype]


def dtype_name(dtype: torch.dtype) -> DTypeName:
    """The wire's name of a dtype.

    Raises:
        KeyError: the dtype never travels.
    """
    return _NAMES[dtype]


def encode(tensor: torch.Tensor, codec: CodecName = "none") -> tuple[TensorSpec, memoryview]:
    """A tensor on any device as its spec and a view of its bytes (no copy for contiguous CPU tensors).

    A tensor with values beyond the range of a 16-bit codec is encoded as `none` instead.
    """
    spec = TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype), codec)
    if tensor.numel() == 0:
        return spec, memoryview(b"")
    tensor = tensor.detach()
    if codec == "none":
        wire = tensor
    elif codec == "int8":
        wire = _to_int8(tensor)
    else:
        wire = tensor.to(_DTYPES[codec])
        if not is_finite(wire):
            return encode(tensor)
    wire = wire.cpu().contiguous()
    if wire.dtype is torch.bfloat16:
        wire = wire.view(torch.int16)  # numpy knows no bfloat16
    return spec, memoryview(wire.numpy()).cast("B")  # type: ignore[arg-type]


def decode(spec: TensorSpec, payload: memoryview, *, owned: bool = False) -> torch.Tensor:
    """The tensor that `spec` describes.

    Args:
        payload: exactly `spec.nbytes` bytes.
        owned: the payload is writable and nothing else uses it, so that the tensor may be a view of it. It is
            copied otherwise, and where a value would not be aligned in memory.
    """
    dtype = spec.torch_dtype
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    wire = torch.int8 if spec.codec == "int8" else dtype if spec.codec == "none" else _DTYPES[spec.codec]
    values = torch.frombuffer(payload if owned else bytearray(payload), dtype=wire)
    if values.data_ptr() % wire.itemsize:
        values = torch.frombuffer(bytearray(payload), dtype=wire)
    if spec.codec == "int8":
        return _from_int8(values, spec.shape).to(dtype)
    return values.reshape(spec.shape).to(dtype)


def passed(tensor: torch.Tensor, codec: CodecName) -> torch.Tensor:
    """What the receiver of this tensor has."""
    if codec == "none":
        return tensor
    return decode(*encode(tensor, codec))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # Either survives any sum, which is one pass. Finite values may overflow in it: then each is looked at.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _blocks(shape: tuple[int, ...]) -> int:
    """Blocks of `int8` in the last dimension."""
    return -(-(shape[-1] if shape else 1) // BLOCK)


def _to_int8(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's blocks' powers of two, and then its values as multiples of them, -127 to 127, as int8."""
    width = tensor.shape[-1] if tensor.dim() else 1
    values = tensor.to(torch.float32).reshape(-1, width)
    blocks = torch.nn.functional.pad(values, (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    # Of the largest magnitude, 6 bits before the point; 7 unless it would be rounded up to 128.
    bits = blocks.abs().amax(dim=2).view(torch.int32)
    low, high = _EXPONENTS[tensor.dtype]
    exponents = (((bits + (1 << 16)) >> 23) - 133).clamp(low, high)
    scaled = (blocks * _power_of_two(-exponents).unsqueeze(2)).round_().clamp_(-127, 127)
    infinite = bits >= 0x7F800000
    if bool(infinite.any()):
        exponents[infinite] = _NOT_FINITE
        scaled[infinite] = 0
    whole = scaled.to(torch.int8).flatten(1)[:, :width]
    return torch.cat([exponents.to(torch.int8).flatten(), whole.flatten()])


def _from_int8(wire: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    width = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    exponents, whole = wire.split([rows * _blocks(shape), rows * width])
    # -128 becomes minus infinity here: nothing that it is multiplied with is finite.
    scales = _power_of_two(exponents.to(torch.int32)).reshape(rows, -1).repeat_interleave(BLOCK, 1)
    return (whole.reshape(rows, width).to(torch.float32) * scales[:, :width]).reshape(shape)


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 to these int32, -126 to 127, exactly: written into the exponent's bits of a float32."""
    return ((exponents + 127) << 23).view(torch.float32)
