"""Tensors to bytes and back."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmkit.net.protocol.codec import BLOCK, TensorSpec, decode, dtype_name, encode

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
SHAPES = [(), (1,), (2, 3), (1, 1, 4), (2, 1, 3, 2)]


def there_and_back(tensor: torch.Tensor, codec: str = "none") -> torch.Tensor:
    spec, data = encode(tensor, codec)  # type: ignore[arg-type]
    return decode(
        msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=TensorSpec), memoryview(bytes(data))
    )


def some(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).abs().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_comes_back_as_it_was(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(shape, dtype)
    back = there_and_back(tensor)
    assert (back.dtype, back.shape) == (dtype, shape)
    assert torch.equal(back, tensor)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_every_pattern_of_bits_comes_back(patterns: list[int]) -> None:
    tensor = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)  # NaNs included
    assert torch.equal(there_and_back(tensor).view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_an_empty_tensor_keeps_its_shape(shape: tuple[int, ...]) -> None:
    assert there_and_back(torch.empty(shape)).shape == shape


def test_a_tensor_that_is_not_contiguous_comes_back_in_order() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(there_and_back(tensor), tensor)


def test_a_tensor_that_learns_comes_back_without_its_gradient() -> None:
    assert not there_and_back(torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("codec", ["float16", "bfloat16"])
def test_a_codec_halves_the_bytes(codec: str) -> None:
    spec, data = encode(torch.ones(2, 3), codec)  # type: ignore[arg-type]
    assert (spec.nbytes, data.nbytes) == (12, 12)


@pytest.mark.parametrize(("codec", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_a_codec_rounds_and_restores_the_dtype(codec: str, dtype: torch.dtype) -> None:
    tensor = some((2, 3), torch.float32)
    back = there_and_back(tensor, codec)
    assert back.dtype is torch.float32
    assert torch.equal(back, tensor.to(dtype).float())


def test_what_is_decoded_is_a_copy() -> None:
    data = bytearray(8)
    tensor = decode(TensorSpec((2,), "float32"), memoryview(data))
    data[:] = b"\xff" * 8
    assert torch.equal(tensor, torch.zeros(2))


def test_contiguous_tensors_are_not_copied_to_be_sent() -> None:
    tensor = torch.zeros(2)
    _, data = encode(tensor)
    tensor[0] = 1.0
    assert data[:4] == torch.ones(1).numpy().tobytes()


def test_the_size_is_known_from_the_spec_alone() -> None:
    assert TensorSpec((2**31, 2**31, 2**31, 2**31), "float32").nbytes == 2**126


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_travels_has_a_name(dtype: torch.dtype) -> None:
    assert getattr(torch, dtype_name(dtype)) is dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.bool], ids=str)
def test_other_dtypes_do_not_travel(dtype: torch.dtype) -> None:
    with pytest.raises(KeyError):
        encode(torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize(
    "spec",
    [
        [[1, 1, 1, 1, 1], "float32", "none"],
        [[-1], "float32", "none"],
        [[2**31 + 1], "float32", "none"],
        [[1.5], "float32", "none"],
        [[1], "float64", "none"],
        [[1], "float32", "zip"],
        [[1], "float32", "none", "more"],
        [[1]],
        {"shape": [1], "dtype": "float32"},
    ],
)
def test_a_spec_that_makes_no_sense_is_not_read(spec: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=TensorSpec)


# lossy codecs

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
few = settings(max_examples=50)
patterns = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70)


def of_bits(patterns: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Finite values of any magnitude that the dtype has."""
    values = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)
    if dtype is torch.float16:  # else nearly all would be beyond its range
        values = torch.tensor(patterns, dtype=torch.int64).to(torch.int16).view(torch.float16)
    values = values.to(dtype)
    return torch.where(values.isfinite(), values, torch.zeros_like(values))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@few
@given(bits=patterns)
def test_int8_of_what_was_decoded_is_the_same_bytes(bits: list[int], dtype: torch.dtype) -> None:
    tensor = of_bits(bits, dtype)
    _, once = encode(tensor, "int8")
    _, twice = encode(there_and_back(tensor, "int8"), "int8")
    assert bytes(once) == bytes(twice)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@few
@given(bits=patterns)
def test_int8_is_within_its_bound(bits: list[int], dtype: torch.dtype) -> None:
    tensor = of_bits(bits, dtype)
    error = (there_and_back(tensor, "int8").double() - tensor.double()).abs()
    floor = 2.0**-25 if dtype is torch.float16 else 2.0**-127
    for values, errors in zip(tensor.double().split(BLOCK), error.split(BLOCK), strict=True):
        assert float(errors.max()) <= max(float(values.abs().max()) / 127, floor)


@pytest.mark.parametrize(
    ("codec", "share", "floor"), [("bfloat16", 2.0**-8, 2.0**-134), ("float16", 2.0**-11, 2.0**-25)]
)
@few
@given(bits=patterns)
def test_half_the_bytes_are_within_their_bound_and_then_stay(
    bits: list[int], codec: str, share: float, floor: float
) -> None:
    tensor = of_bits(bits, torch.float32)
    once = there_and_back(tensor, codec)
    error = (once.double() - tensor.double()).abs()
    assert bool((error <= (tensor.double().abs() * share).clamp(min=floor)).all())
    assert torch.equal(there_and_back(once, codec), once)


@pytest.mark.parametrize("value", [65520.0, -7e4, float("inf"), float("nan")])
def test_what_float16_cannot_hold_travels_as_it_is(value: float) -> None:
    tensor = torch.tensor([1.1, value])
    spec, _ = encode(tensor, "float16")
    assert spec.codec == "none"
    assert there_and_back(tensor, "float16").tolist() == pytest.approx(tensor.tolist(), nan_ok=True, rel=0)


def test_the_largest_of_float16_is_no_exception() -> None:
    assert encode(torch.tensor([65504.0]), "float16")[0].codec == "float16"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_not_hidden_by_int8(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 40, dtype=dtype)
    tensor[1, 35] = value
    assert there_and_back(tensor, "int8").isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [*SHAPES, (0,), (2, 0, 3), (2, 3, 0), (3, 32), (2, 3, 33)], ids=str)
def test_int8_needs_a_byte_a_value_and_one_a_block(shape: tuple[int, ...]) -> None:
    spec, data = encode(some(shape, torch.float32), "int8")
    width = shape[-1] if shape else 1
    assert (
        spec.nbytes
        == data.nbytes
        == torch.Size(shape).numel() + torch.Size(shape[:-1]).numel() * -(-width // 32)
    )
    assert there_and_back(some(shape, torch.float32), "int8").shape == shape


def test_a_tokens_values_in_int8_do_not_depend_on_its_neighbours() -> None:
    tensor = some((2, 3, 40), torch.float32)
    alone = [there_and_back(tensor[:, at : at + 1], "int8") for at in range(3)]
    assert torch.equal(there_and_back(tensor, "int8"), torch.cat(alone, dim=1))


@few
@given(st.binary(min_size=2 * 42, max_size=2 * 42))
def test_no_bytes_break_int8(payload: bytes) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        tensor = decode(TensorSpec((2, 40), dtype, "int8"), memoryview(payload))  # type: ignore[arg-type]
        assert tensor.shape == (2, 40)
