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
    """The files of one model, at one fixed state.

    Attributes:
        commit: of a repository; None where there is none.
    """

    commit: str | None

    def find(self, name: str) -> Path | None:
        """The file on this machine, fetched as a whole if need be; None if the model has no such file."""

    def exists(self, name: str) -> bool:
        """Whether the model has such a file, without fetching it."""

    def sha256(self, name: str) -> str:
        """The file's SHA-256 in hex, without fetching it where that can be."""

    def keys(self, name: str) -> Iterable[str]:
        """The names of the tensors in a file of weights, without fetching more than its header where that can
        be.
        """

    def fetch(self, parts: Sequence[Part], on_bytes: OnBytes | None = None) -> None:
        """Bring these tensors onto this machine, if they are not here."""

    def read(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """These tensors, fetched if need be."""

    def nbytes(self, part: Part) -> int:
        """Bytes of a part's tensors, as they are stored; without fetching them where that can be."""

    def content(self, part: Part) -> str | None:
        """The SHA-256 of a part's file in the store, if it has one there."""

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        """The arguments with which transformers' `from_pretrained` loads from the same place."""


class LocalFiles:
    """A folder, as `save_pretrained` writes it. Read as it is; nothing of it is copied."""

    def __init__(self, folder: Path, *, progress: bool = True) -> None:
        self.folder = folder
        self.commit: str | None = None
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
        """All of it is here."""

    def read(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for shard, keys in by_shard(parts).items():
            tensors.update(read_from(self._path(shard), keys, str(self.folder)))
        return tensors

    def nbytes(self, part: Part) -> int:
        shards = by_shard([part])
        return sum(bytes_in(self._path(shard), keys, str(self.folder)) for shard, keys in shards.items())

    def content(self, part: Part) -> str | None:
        return None

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
    """The file that says where the weights are: an index, or the only file of weights there is.

    Safetensors are preferred; files of PyTorch's own format will do.

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
