"""The files of a model: what they offer, whatever their place, and those in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.fingerprint import file_sha256
from swarmkit.models.checkpoint.shards import OnBytes, Part, by_shard, bytes_in, keys_in, read_from

PACKAGED = "tiny-chat"
"""The model that comes with the package."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"


class Files(Protocol):
    """The files of one model, in one fixed state.

    Attributes:
        commit: the commit of a repository; None for a folder.
        block_hashes: the SHA-256 of each block's file in the store, as a fingerprint covers it; empty where
            it covers none.
    """

    commit: str | None
    block_hashes: tuple[str, ...]

    def find(self, name: str) -> Path | None:
        """Return a file on this machine, fetched if need be; None if the model has no such file."""

    def exists(self, name: str) -> bool:
        """Whether the model has such a file, without fetching it."""

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file in hex, without fetching it where that is possible."""

    def keys(self, name: str) -> Iterable[str]:
        """Return the names of the tensors in a shard; only its header is fetched where that is possible."""

    def fetch(self, parts: Sequence[Part], on_bytes: OnBytes | None = None) -> None:
        """Fetch these tensors, if they are not on this machine."""

    def read(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Read these tensors, fetched if need be."""

    def nbytes(self, part: Part) -> int:
        """Return the bytes of a part's tensors as they are stored, without fetching them where that is
        possible.
        """

    def has(self, part: Part) -> bool:
        """Return whether reading a part needs no network."""

    def content(self, part: Part) -> str | None:
        """Return the SHA-256 of a part's file in the store; None if it has none there."""

    def known_hash(self, part: Part) -> str | None:
        """Return the SHA-256 that a part's file must have, without a peer's word; None if it is not known."""

    def release(self, part: Part) -> None:
        """Let a part's file be evicted from the store, because this process needs it no longer."""

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        """Return the arguments with which transformers' `from_pretrained` loads from the same place."""


class LocalFiles:
    """A folder as `save_pretrained` writes it, read where it is."""

    def __init__(self, folder: Path, *, progress: bool = True) -> None:
        self.folder = folder
        self.commit: str | None = None
        self.block_hashes: tuple[str, ...] = ()
        self._progress = progress

    def find(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None

    def exists(self, name: str) -> bool:
        return self.find(name) is not None

    def sha256(self, name: str) -> str:
        path = self.find(name)
        if path is None:
            raise ModelError(
                f"{self.folder} lacks {name}, which its index names. Its fingerprint needs all "
                "its files: download the rest, or give the model's Hub name, which needs only those in use."
            )
        return file_sha256(path, progress=self._progress)

    def keys(self, name: str) -> Iterable[str]:
        return keys_in(self._path(name), str(self.folder))

    def fetch(self, parts: Sequence[Part], on_bytes: OnBytes | None = None) -> None:
        """Do nothing: all tensors are on this machine."""

    def read(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for shard, keys in by_shard(parts).items():
            tensors.update(read_from(self._path(shard), keys, str(self.folder)))
        return tensors

    def nbytes(self, part: Part) -> int:
        shards = by_shard([part])
        return sum(bytes_in(self._path(shard), keys, str(self.folder)) for shard, keys in shards.items())

    def has(self, part: Part) -> bool:
        return True

    def content(self, part: Part) -> str | None:
        return None

    def known_hash(self, part: Part) -> str | None:
        return None

    def release(self, part: Part) -> None:
        """Do nothing: a folder is its owner's."""

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        return str(self.folder), {"local_files_only": True}

    def _path(self, name: str) -> Path:
        path = self.find(name)
        if path is None:
            raise ModelError(
                f"{self.folder} lacks the file {name}, which its index names; download it again."
            )
        return path


def weights_listing(files: Files, name: str) -> str:
    """Return the name of the file that lists the weights: an index, or the only shard there is.

    Safetensors are preferred to files of PyTorch's own format.

    Raises:
        ModelError: there are none.
    """
    for index, single in ((INDEX_FILE, SINGLE_FILE), (PICKLE_INDEX_FILE, PICKLE_FILE)):
        # An index is wanted at once, and that it does not exist is remembered for when there is no
        # connection.
        if files.find(index) is not None:
            return index
        if files.exists(single):
            return single
    raise ModelError(
        f"{name} has neither {SINGLE_FILE} nor {INDEX_FILE} (nor {PICKLE_FILE}). "
        "Give a checkpoint with safetensors weights, as `save_pretrained` writes it."
    )
