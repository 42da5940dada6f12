"""Putting tensors that are in memory into the store, and hashing those that lie in other files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.shards import Part
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_format import FormatError, TensorPlace, lay_out, read_header, sha256_of

_CHUNK_BYTES = 4 * 1024 * 1024

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def keep_tensors(store: BlockStore, source: str, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep a part whose tensors are in memory, or mapped into it, in the store.

    Raises:
        ModelError: a dtype that safetensors does not know, or no room.
    """
    try:
        places = [
            TensorPlace(key, _NAMES[value.dtype], tuple(value.shape), 0, 0) for key, value in tensors.items()
        ]
        layout = lay_out(places)
    except (KeyError, FormatError) as error:
        raise ModelError(
            f"{part} of {source} has weights of a kind that cannot be stored: {error}"
        ) from error
    partial = store.partial(source, part)
    store.reserve(partial, layout.size)
    with store.writing(part), partial.open("r+b") as file:
        file.write(layout.front)
        for key, place in sorted(layout.places.items(), key=lambda item: (item[1].start, item[1].stop)):
            flat = tensors[key].detach().contiguous().reshape(-1)
            if place.nbytes:
                file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        file.flush()
        file.seek(0)
        content = sha256_of(file)
    store.keep(partial, source, part, content, "hub")


def hash_of_part(part: Part, shards: Mapping[str, Path]) -> str:
    """Return the SHA-256 that a part's file would have, whose tensors lie in whole shards on this machine.

    Args: shards: safetensors files, by name.

    Raises:
        ModelError: a shard is damaged or lacks a tensor.
    """
    try:
        places = {name: read_header(path).places for name, path in shards.items()}
        origin = {key: places[shard][key] for key, shard in part.shards.items()}
        layout = lay_out(origin.values())
        digest = hashlib.sha256(layout.front)
        with ExitStack() as opened:
            files = {name: opened.enter_context(path.open("rb")) for name, path in shards.items()}
            for key in sorted(layout.places, key=lambda key: layout.places[key].start):
                file, left = files[part.shards[key]], origin[key].nbytes
                file.seek(origin[key].start)
                while left:
                    chunk = file.read(min(left, _CHUNK_BYTES))
                    if not chunk:
                        raise FormatError(f"tensor {key!r} is cut off")
                    digest.update(chunk)
                    left -= len(chunk)
        return digest.hexdigest()
    except (FormatError, OSError, KeyError) as error:
        raise ModelError(f"{part.label} cannot be read from the Hub's cache ({error}); delete it.") from error
