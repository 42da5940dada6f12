"""Where a model's files come from: a folder, or a repository on the Hugging Face Hub (file by file)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from swarmkit.errors import ModelError
from swarmkit.models.fingerprint import file_sha256, recall, remember

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OLD_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")

NO_SAFETENSORS = (
    "Weights in .bin files are not loaded, because opening them can run code. Convert them once with "
    "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)` and give that folder."
)


class Files(Protocol):
    """The files of one model, at one fixed state."""

    def find(self, name: str) -> Path | None:
        """The file on this machine, fetched if need be; None if the model has no such file."""

    def exists(self, name: str) -> bool:
        """Whether the model has such a file, without fetching it."""

    def sha256(self, name: str) -> str:
        """The file's SHA-256 in hex, without fetching it where that can be."""

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        """The arguments with which transformers' `from_pretrained` loads from the same place."""


class LocalFiles:
    """A folder, as `save_pretrained` writes it."""

    def __init__(self, folder: Path, *, progress: bool = True) -> None:
        self.folder = folder
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

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        return str(self.folder), {"local_files_only": True}


class HubFiles:
    """A repository on the Hub, pinned to the commit that its revision meant when it was opened."""

    def __init__(self, repo: str, revision: str | None, token: str | None, *, progress: bool = True) -> None:
        """Fetch config.json, which tells the commit.

        Raises:
            ModelError: there is no such repository, it is gated, or it cannot be reached.
        """
        self.repo = repo
        self._token = token
        self._progress = progress
        self.commit = revision
        config = self.find("config.json")
        if config is None:
            raise ModelError(
                f"{repo} on the Hub has no config.json, so it is not a transformers model. "
                "Check the name; for adapters and GGUF files give the base model instead."
            )
        self.commit = config.parent.name

    def find(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with self._explained(name):
            try:
                path = hf_hub_download(self.repo, name, revision=self.commit, token=self._token)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
        return Path(path)

    def exists(self, name: str) -> bool:
        return self._cached(name) is not None or self._etag(name) is not None

    def sha256(self, name: str) -> str:
        key = f"hub:{self.repo}@{self.commit}/{name}"
        known = recall(key)
        if isinstance(known, str) and _SHA256.fullmatch(known):
            return known
        cached = self._cached(name)
        # The Hub keeps large files under their SHA-256, and so does its cache on this machine.
        sha256 = cached.resolve().name if cached is not None else self._etag(name)
        if sha256 is None or not _SHA256.fullmatch(sha256):
            path = self.find(name)
            if path is None:
                raise ModelError(f"{self.repo} on the Hub lacks {name} of its index; tell its owner.")
            sha256 = file_sha256(path, progress=self._progress)
        remember(key, sha256)
        return sha256

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        return self.repo, {"revision": self.commit, "token": self._token}

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def _etag(self, name: str) -> str | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with self._explained(name):
            try:
                url = hf_hub_url(self.repo, name, revision=self.commit)
                return get_hf_file_metadata(url, token=self._token).etag or ""
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turns the Hub client's many errors into one that says what to do."""
        from huggingface_hub import errors

        try:
            yield
        except (errors.EntryNotFoundError, ModelError) as error:
            if not isinstance(error, errors.LocalEntryNotFoundError):
                raise
            raise ModelError(self._unreachable(name)) from error
        except errors.GatedRepoError as error:
            raise ModelError(
                f"{self.repo} on the Hub is gated. Accept its terms at https://huggingface.co/{self.repo}, "
                "then set HF_TOKEN or run `huggingface-cli login` (`hf auth login` in newer versions)."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ModelError(
                f"{self.repo} on the Hub has no revision {self.commit!r}. Check the branch, tag or commit."
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise ModelError(
                f"There is no folder {self.repo!r} here and no such model on the Hub. Check the "
                "spelling (a Hub name looks like Qwen/Qwen3-8B; the packaged model is called tiny-chat). "
                "If it is private or gated, set HF_TOKEN or run `huggingface-cli login`."
            ) from error
        except Exception as error:
            # The client lets connection errors of its HTTP library through, and these differ by version.
            raise ModelError(f"{self._unreachable(name)} ({type(error).__name__}: {error})") from error

    def _unreachable(self, name: str) -> str:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            return (
                f"{name} of {self.repo} is not in the Hub's cache on this machine, and HF_HUB_OFFLINE is "
                "set. Unset it once to download, or give a local folder."
            )
        return (
            f"{name} of {self.repo} could not be fetched from the Hub, nor is it in this machine's cache. "
            "Check the connection and the spelling, give a local folder, or use the packaged model tiny-chat."
        )


def open_files(model: str, *, revision: str | None, token: str | None, progress: bool) -> Files:
    """The files of `model`: "tiny-chat", a folder, or a Hub name; see `Checkpoint.open`."""
    if model == "tiny-chat":
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
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or "\\" in model:
        raise ModelError(
            f"There is no folder {folder}. Check the path; a Hub name looks like Qwen/Qwen3-8B, "
            "and the packaged model is called tiny-chat."
        )
    return HubFiles(model, revision, token, progress=progress)


def refuse_unless_safetensors(files: Files, name: str) -> None:
    """Check that there are weights to load.

    Raises:
        ModelError: there are none, or only .bin files.
    """
    if files.exists(INDEX_FILE) or files.exists(SINGLE_FILE):
        return
    if any(files.exists(old) for old in _OLD_FILES):
        raise ModelError(f"{name} has no safetensors files, only pytorch_model.bin. {NO_SAFETENSORS}")
    raise ModelError(
        f"{name} has neither {SINGLE_FILE} nor {INDEX_FILE}. "
        "Give a checkpoint with safetensors weights, as `save_pretrained` writes it."
    )
