"""Shards, the files that a model's weights lie in, and the parts that are cut from them.

A shard on this machine is a safetensors file, or one of PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.pickles import open_pickle
from swarmkit.models.checkpoint.store_format import FormatError, read_header

OnBytes = Callable[[int, int], None]
"""`on_bytes(done, total)`: called as bytes arrive."""


@dataclass(frozen=True)
class Part:
    """Some tensors that the store keeps in one file.

    Attributes:
        label: unique within the model, e.g. "block 3".
        shards: the tensors' names, to the shard that each lies in.
    """

    label: str
    shards: Mapping[str, str] = field(repr=False)


def by_shard(parts: Iterable[Part]) -> dict[str, list[str]]:
    """The names of the tensors of `parts`, by the shard they lie in."""
    found: dict[str, list[str]] = {}
    for part in parts:
        for key, shard in part.shards.items():
            found.setdefault(shard, []).append(key)
    return found


def keys_in(path: Path, name: str) -> list[str]:
    """The names of the tensors in a shard.

    Raises:
        ModelError: it is damaged or may not be opened.
    """
    if path.suffix != ".safetensors":
        return list(open_pickle(path, name))
    with _opened(path, name) as file:
        return list(file.keys())


def bytes_in(path: Path, keys: Iterable[str], name: str) -> int:
    """Bytes of some tensors in a shard.

    Raises:
        ModelError: it is damaged, may not be opened, or lacks one.
    """
    if path.suffix != ".safetensors":
        return sum(tensor.nbytes for tensor in read_from(path, keys, name).values())
    try:
        places = read_header(path).places
        return sum(places[key].nbytes for key in keys)
    except (FormatError, OSError, KeyError) as error:
        raise ModelError(f"{path.name} of {name} is damaged ({error}); download it again.") from error


def read_from(path: Path, keys: Iterable[str], name: str) -> Mapping[str, Tensor]:
    """Read some tensors from a shard.

    Raises:
        ModelError: it is damaged, may not be opened, or lacks one.
    """
    try:
        if path.suffix != ".safetensors":
            content = open_pickle(path, name)
            return {key: content[key] for key in keys}
        with _opened(path, name) as file:
            return {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, KeyError) as error:
        raise ModelError(
            f"{path.name} of {name} lacks a tensor of its index ({error}); download it again."
        ) from error


def _opened(path: Path, name: str) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} of {name} is damaged ({error}); download it again.") from error
