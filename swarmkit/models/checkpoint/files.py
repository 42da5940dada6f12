"""Where a model's files come from: a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.fingerprint import file_sha256
from swarmkit.models.checkpoint.store_fetch import OnBytes, Part
from swarmkit.models.checkpoint.store_format import FormatError, read_header

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


def is_hub_name(model: str) -> bool:
    """Whether `model` can only be the name of a repository on the Hub."""
    path = Path(model).expanduser()
    elsewhere = path.exists() or path.is_absolute() or model.startswith((".", "~"))
    return model != PACKAGED and not elsewhere and model.count("/") <= 1 and "\\" not in model


def open_files(
    model: str,
    *,
    revision: str | None,
    token: str | None,
    fingerprint: str | None = None,
    progress: bool = True,
) -> Files:
    """The files of `model`: "tiny-chat", a folder, or a Hub name; see `Checkpoint.open`.

    That they have the given fingerprint remains to be seen, except where its manifest is here.
    """
    if model == PACKAGED:
        from swarmkit.tinychat import CHECKPOINT

        folder = Path(CHECKPOINT)
        if not (folder / "config.json").is_file():
            raise ModelError(f"The packaged model tiny-chat is not in {folder}. Install swarmkit again.")
        return LocalFiles(folder, progress=progress)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} has no config.json, so it is not a transformers checkpoint. "
                "Give the folder that `save_pretrained` wrote (or one snapshot inside the Hub's cache)."
            )
        return LocalFiles(folder, progress=progress)
    if folder.is_file():
        raise ModelError(f"{folder} is a file. Give the folder with config.json and the safetensors files.")
    if not is_hub_name(model):
        raise ModelError(
            f"There is no folder {folder}. Check the path; a Hub name looks like Qwen/Qwen3-8B, "
            "and the packaged model is called tiny-chat."
        )
    if fingerprint is not None:
        from swarmkit.models.checkpoint.store_pinned import open_pinned

        pinned = open_pinned(model, fingerprint, token, progress=progress)
        if pinned is not None:
            return pinned
    from swarmkit.models.checkpoint.store_hub import HubFiles
    from swarmkit.models.checkpoint.store_pinned import open_last_pinned

    try:
        return HubFiles(model, revision, token, progress=progress)
    except ModelError:
        # Offline, the last fingerprint that was given for a name stands for it, as its last commit does.
        pinned = open_last_pinned(model, token, progress=progress) if revision is None else None
        if pinned is None or fingerprint is not None:
            raise
        return pinned


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


def by_shard(parts: Iterable[Part]) -> dict[str, list[str]]:
    """The tensors of `parts` by the file they lie in."""
    found: dict[str, list[str]] = {}
    for part in parts:
        for key, shard in part.shards.items():
            found.setdefault(shard, []).append(key)
    return found


def keys_in(path: Path, name: str) -> list[str]:
    """The names of the tensors in a file of weights.

    Raises:
        ModelError: it is damaged or may not be opened.
    """
    if path.suffix != ".safetensors":
        from swarmkit.models.checkpoint.store_pickles import open_pickle

        return list(open_pickle(path, name))
    with _opened(path, name) as file:
        return list(file.keys())


def bytes_in(path: Path, keys: Iterable[str], name: str) -> int:
    """Bytes of some tensors of a file of weights.

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
    """Some tensors of a file of weights.

    Raises:
        ModelError: it is damaged, may not be opened, or lacks one.
    """
    try:
        if path.suffix != ".safetensors":
            from swarmkit.models.checkpoint.store_pickles import open_pickle

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
