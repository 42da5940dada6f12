"""Tensors to bytes and back.

A tensor travels as a `TensorSpec` in the message header and its raw little-endian bytes in the payload. The
spec is checked before one byte of the payload is read, so that nobody can make a peer allocate more than it
allows. `codec` names how the values were written: `"none"` keeps the tensor's own dtype, `"float16"` and
`"bfloat16"` halve float32; the receiver restores `dtype`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
import torch

DTypeName = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
CodecName = Literal["none", "float16", "bfloat16"]

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
    """A tensor on any device as its spec and a view of its bytes (no copy for contiguous CPU tensors)."""
    spec = TensorSpec(tuple(tensor.shape), dtype_name(tensor.dtype), codec)
    if tensor.numel() == 0:
        return spec, memoryview(b"")
    wire = (tensor if codec == "none" else tensor.to(_DTYPES[codec])).detach().cpu().contiguous()
    if wire.dtype is torch.bfloat16:
        wire = wire.view(torch.int16)  # numpy knows no bfloat16
    return spec, memoryview(wire.numpy()).cast("B")  # type: ignore[arg-type]


def decode(spec: TensorSpec, payload: memoryview) -> torch.Tensor:
    """The tensor that `spec` describes; `payload` holds exactly `spec.nbytes` bytes, which are copied."""
    dtype = spec.torch_dtype
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    wire = dtype if spec.codec == "none" else _DTYPES[spec.codec]
    tensor = torch.frombuffer(bytearray(payload), dtype=wire).reshape(spec.shape)
    return tensor if wire is dtype else tensor.to(dtype)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # Either survives any sum, which is one pass. Finite values may overflow in it: then each is looked at.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
