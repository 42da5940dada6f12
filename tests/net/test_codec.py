"""Tensors to bytes and back."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.net.codec import TensorSpec, decode, dtype_name, encode

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
