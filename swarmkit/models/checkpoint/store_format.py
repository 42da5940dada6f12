"""The safetensors format, as far as fetching parts of files needs it: reading headers, laying out files.

A safetensors file is 8 bytes (the header's length, little-endian), a JSON header, and the tensors' bytes::

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}

A part of a model (a block, or the tensors in no block) is stored as one such file, whose every byte follows
from its tensors: order, header and padding are fixed here. So the same tensors make the same file on every
machine, and its SHA-256 names the part wherever it came from.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from swarmkit.errors import ModelError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 32 * 1024 * 1024
"""Largest header that is read into memory; enough for two hundred thousand tensors."""

_LENGTH = struct.Struct("<Q")
_HASH_CHUNK_BYTES = 4 * 1024 * 1024
_MAX_DIMENSIONS = 32
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


class FormatError(ModelError):
    """The bytes are not a safetensors file."""


@dataclass(frozen=True)
class TensorPlace:
    """One tensor in a file: bytes `[start, stop)`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What the front of a safetensors file says.

    Attributes:
        front: the length and the header itself, as they stand in the file.
        size: of the whole file.
        places: by tensor name.
    """

    front: bytes = field(repr=False)
    size: int
    places: Mapping[str, TensorPlace] = field(repr=False)


def header_length(first: bytes, file_size: int) -> int:
    """Read the length of the header from the first 8 bytes of a file.

    Raises:
        FormatError: longer than the file or than `MAX_HEADER_BYTES`.
    """
    if len(first) != LENGTH_BYTES or file_size < LENGTH_BYTES:
        raise FormatError(f"a file of {file_size} bytes is too short")
    length: int = _LENGTH.unpack(first)[0]
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > file_size:
        raise FormatError(f"a header of {length} bytes cannot be, in a file of {file_size}")
    return length


def parse_header(front: bytes, file_size: int) -> Header:
    """Read and check a header.

    Args:
        front: the file's beginning, exactly up to the end of the header.

    Raises:
        FormatError: not JSON of the right form, an unknown dtype, offsets outside the file, tensors that
            overlap or whose bytes are not what dtype and shape say.
    """
    length = header_length(front[:LENGTH_BYTES], file_size)
    if len(front) != LENGTH_BYTES + length:
        raise FormatError(f"the header has {len(front) - LENGTH_BYTES} bytes instead of {length}")
    try:
        content = json.loads(front[LENGTH_BYTES:], object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the header is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise FormatError("the header is not a JSON object")
    content.pop("__metadata__", None)
    places = {name: _place(name, entry, len(front), file_size) for name, entry in content.items()}
    end = len(front)
    for place in sorted(places.values(), key=lambda place: (place.start, place.stop)):
        if place.start < end and place.nbytes:
            raise FormatError(f"tensor {place.name!r} overlaps another")
        end = max(end, place.stop)
    return Header(front, file_size, places)


def read_header(path: Path) -> Header:
    """Read the header of a file on this machine.

    Raises:
        FormatError: it is not a safetensors file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        first = file.read(LENGTH_BYTES)
        return parse_header(first + file.read(header_length(first, size)), size)


def lay_out(tensors: Iterable[TensorPlace]) -> Header:
    """Lay out the file that holds exactly these tensors, of which only name, dtype and shape matter.

    Wider dtypes come first, so that every tensor is aligned, and names in order after that.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_BITS[tensor.dtype], tensor.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + bytes_of(tensor.dtype, tensor.shape)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return parse_header(_LENGTH.pack(len(text)) + text, LENGTH_BYTES + len(text) + end)


def bytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor.

    Raises:
        FormatError: an unknown dtype, or values that do not fill whole bytes.
    """
    if dtype not in _BITS:
        raise FormatError(f"dtype {dtype!r} is not known")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8:
        raise FormatError(f"a tensor of {bits} bits does not end with a byte")
    return bits // 8


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256, in hex, of an open file from its present position on."""
    digest = hashlib.sha256()
    while chunk := file.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _place(name: str, entry: Any, front: int, file_size: int) -> TensorPlace:
    if not isinstance(entry, dict):
        raise FormatError(f"tensor {name!r} is not described by an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"tensor {name!r} lacks a dtype, shape or offsets")
    if len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"tensor {name!r} has {len(shape)} dimensions")
    start, stop = offsets
    if not 0 <= start <= stop <= file_size - front:
        raise FormatError(f"tensor {name!r} lies outside the file")
    if bytes_of(dtype, shape) != stop - start:
        raise FormatError(f"tensor {name!r} of {dtype} {shape} cannot have {stop - start} bytes")
    return TensorPlace(name, dtype, tuple(shape), front + start, front + stop)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**62 for size in value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise FormatError("the header names a tensor twice")
    return content
