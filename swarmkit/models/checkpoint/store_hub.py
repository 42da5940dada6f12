"""A repository on the Hugging Face Hub: small files through its cache, weights as parts in the store."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.byte_ranges import ByteRange
from swarmkit.models.checkpoint.fingerprint import file_sha256, recall, remember
from swarmkit.models.checkpoint.ranges import SHA256, RemoteFile, RetryPolicy
from swarmkit.models.checkpoint.shards import OnBytes, Part, by_shard, bytes_in, keys_in, read_from
from swarmkit.models.checkpoint.store import BlockStore, StoreEntry, key_of
from swarmkit.models.checkpoint.store_fetch import Claims, fetch_parts
from swarmkit.models.checkpoint.store_format import FormatError, Header, parse_header
from swarmkit.models.checkpoint.store_tensors import hash_of_part, keep_tensors

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BAR_FROM_BYTES = 8 * 1024 * 1024


class HubFiles:
    """A repository, pinned to the commit that its revision meant when it was opened.

    Weights that the Hub's cache on this machine holds already are read from there.

    Attributes:
        commit: the commit, which never changes.
        block_hashes: those that a fingerprint covers; none here.
        store: where parts of the weights are kept.
        received: bytes of weights that came from the Hub so far.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None,
        token: str | None,
        *,
        progress: bool = True,
        store: BlockStore | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Fetch config.json, which tells the commit.

        Raises:
            ModelError: there is no such repository, it is gated, or it cannot be reached.
        """
        self.repo = repo
        self.store = store or BlockStore()
        self.commit: str | None
        self._token = token
        self._progress = progress
        self.retry = retry
        self._headers: dict[str, Header] = {}
        self._remotes = (
            threading.local()
        )  # a remote file is for one thread, and servers may share a checkpoint
        self._opened: list[RemoteFile] = []
        self.block_hashes: tuple[str, ...] = ()
        self.commit = revision
        self.commit = self._find_commit()

    def _find_commit(self) -> str:
        config = self.find("config.json")
        if config is None:
            raise ModelError(
                f"{self.repo} on the Hub has no config.json, so it is not a transformers model. "
                "Check the name; for adapters and GGUF files give the base model instead."
            )
        return config.parent.name

    @property
    def source(self) -> str:
        """The store's name for this repository at this commit."""
        return f"{self.repo}@{self.commit}"

    @property
    def received(self) -> int:
        return sum(remote.received for remote in self._opened)

    @cached_property
    def is_public(self) -> bool:
        """Whether it can be read without a token, and without having accepted terms."""
        return self._is_public_on_the_hub()

    def _is_public_on_the_hub(self) -> bool:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        noted = self.store.noted(key_of(self.source, "public"))
        if noted is not None:
            return noted == b"yes"
        try:
            get_hf_file_metadata(hf_hub_url(self.repo, "config.json", revision=self.commit), token=False)
        except Exception:  # noqa: BLE001 - whatever the reason: what is not known to be public is not
            return False
        self.store.remember(key_of(self.source, "public"), b"yes")
        return True

    # ------------------------------------------------------------------ whole files

    def find(self, name: str) -> Path | None:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if self.commit is not None and _COMMIT.fullmatch(self.commit):
            cached: Any = try_to_load_from_cache(self.repo, name, revision=self.commit)
            if cached is not None:  # a commit never changes
                return None if cached is _CACHED_NO_EXIST else Path(cached)
        with self._explained(f"{name} of {self.repo}"):
            try:
                path = hf_hub_download(self.repo, name, revision=self.commit, token=self._token)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
        return Path(path)

    def exists(self, name: str) -> bool:
        return self._cached(name) is not None or self._about(name) is not None

    def sha256(self, name: str) -> str:
        key = f"hub:{self.source}/{name}"
        known = recall(key)
        if isinstance(known, str) and SHA256.fullmatch(known):
            return known
        cached = self._cached(name)
        # The Hub keeps large files under their SHA-256, and so does its cache on this machine.
        sha256 = cached.resolve().name if cached is not None else (self._about(name) or ("", 0))[0]
        if not SHA256.fullmatch(sha256):
            path = self.find(name)
            if path is None:
                raise ModelError(f"{self.repo} on the Hub lacks {name} of its index; tell its owner.")
            sha256 = file_sha256(path, progress=self._progress)
            remember(key, sha256)
        return sha256

    def pretrained(self) -> tuple[str, dict[str, Any]]:
        return self.repo, {"revision": self.commit, "token": self._token}

    # ------------------------------------------------------------------ weights

    def keys(self, name: str) -> Iterable[str]:
        path = self._cached(name) if name.endswith(".safetensors") else self.find(name)
        if path is not None:
            return keys_in(path, self.repo)
        with self._explained(f"{name} of {self.repo}"):
            return list(self.header(name).places)

    def fetch(
        self, parts: Sequence[Part], on_bytes: OnBytes | None = None, claims: Claims | None = None
    ) -> None:
        """Fetch these parts into the store, unless they are there or in the Hub's cache.

        Args:
            claims: the hashes that peers say parts have; see `store_fetch`.

        Raises:
            ModelError: see `store_fetch.fetch_parts`; when offline, the error names the parts that are
                missing.
        """
        from huggingface_hub import constants
        from huggingface_hub.errors import EntryNotFoundError

        ranged = [part for part in parts if not self.is_pickled(part) and not self._is_cached(part)]
        lacking = [part for part in ranged if self.stored(part) is None]
        if lacking:
            names = ", ".join(part.label for part in lacking)
            if constants.is_offline_mode():
                raise ModelError(self._unreachable(f"{names} of {self.source}"))
            try:
                with self._explained(f"{names} of {self.source}"), self._bar(on_bytes) as report:
                    known = {part.label: self.known_hash(part) for part in lacking}
                    expected = {label: content for label, content in known.items() if content is not None}
                    fetch_parts(self.store, self.source, self, lacking, report, claims, expected)
            except EntryNotFoundError as error:
                raise ModelError(
                    f"{self.repo} on the Hub lacks a file of its index; tell its owner."
                ) from error
        for part in parts:
            if self.is_pickled(part):
                self._convert(part)

    def read(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        self.fetch(parts)
        tensors: dict[str, Tensor] = {}
        for part in parts:
            path = self.stored(part)
            if path is not None:
                tensors.update(read_from(path, part.shards, self.repo))
            elif self._is_cached(part):
                for shard, keys in by_shard([part]).items():
                    cached = self._cached(shard)
                    assert cached is not None, "this is what _is_cached means"
                    tensors.update(read_from(cached, keys, self.repo))
            else:
                raise ModelError(
                    f"{part.label} of {self.source} has vanished from the store at {self.store.root}; start "
                    "again."
                )
        return tensors

    def nbytes(self, part: Part) -> int:
        if self.is_pickled(part):
            return sum(tensor.nbytes for tensor in self.read([part]).values())
        total = 0
        for shard, keys in by_shard([part]).items():
            cached = self._cached(shard)
            if cached is not None:
                total += bytes_in(cached, keys, self.repo)
            else:
                places = self.header(shard).places
                total += sum(places[key].nbytes for key in keys if key in places)
        return total

    def has(self, part: Part) -> bool:
        """Whether reading a part needs no network."""
        return self.stored(part) is not None or self._is_cached(part)

    def is_pickled(self, part: Part) -> bool:
        """Whether a part lies in PyTorch's own files, which can only be fetched as a whole."""
        return any(not shard.endswith(".safetensors") for shard in part.shards.values())

    def content(self, part: Part) -> str | None:
        """Return the SHA-256 of a part's file; None if it is not in the store."""
        entry = self._entry(part)
        return entry.content if entry is not None and self.store.blob(entry.content).is_file() else None

    def known_hash(self, part: Part) -> str | None:
        """Return the SHA-256 that a part's file must have: the fingerprint's, or an earlier download's.

        That of a part in the Hub's cache is computed once.
        """
        entry = self._entry(part)
        if entry is not None:
            return entry.content
        if not self._is_cached(part):
            return None
        key = key_of(self.source, part.label, "sha256")
        if (noted := self.store.noted(key)) is not None:
            return noted.decode()
        cached = {shard: self._cached(shard) for shard in set(part.shards.values())}
        content = hash_of_part(part, {shard: path for shard, path in cached.items() if path is not None})
        self.store.remember(key, content.encode())
        return content

    def release(self, part: Part) -> None:
        """Let a part's file be evicted."""
        if (content := self.content(part)) is not None:
            self.store.release(content)

    def _entry(self, part: Part) -> StoreEntry | None:
        """The store's entry of a part, unless it is only a peer's word what the part is."""
        entry = self.store.entry(self.source, part.label)
        return entry if entry is not None and entry.origin == "hub" else None

    def stored(self, part: Part) -> Path | None:
        """Return a part's file in the store, verified; None if it is not there, or only on a peer's word."""
        return None if self._entry(part) is None else self.store.find(self.source, part.label)

    def header(self, name: str, *, fresh: bool = False) -> Header:
        """Return the header of a safetensors file, which is kept; `fresh`: fetch it again."""
        if fresh or name not in self._headers:
            key = key_of(self.source, name, "header")
            front, about = self.store.noted(key), self._about(name)
            if about is None:
                raise ModelError(f"{self.repo} on the Hub lacks {name} of its index; tell its owner.")
            header = None
            if front is not None and not fresh:
                try:
                    header = parse_header(front, about[1])
                except FormatError:
                    header = None  # only our own copy is damaged
            if header is None:
                with self._explained(f"{name} of {self.repo}"):
                    header = self.remote(name).header()
                self.store.remember(key, header.front)
            self._headers[name] = header
        return self._headers[name]

    def remote(self, name: str) -> RemoteFile:
        """Return a file that can be read by ranges."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        mine: dict[str, RemoteFile] = self._remotes.__dict__
        if name not in mine:
            about = self._about(name)
            if about is None:
                raise ModelError(f"{self.repo} on the Hub lacks {name} of its index; tell its owner.")
            mine[name] = RemoteFile(
                hf_hub_url(self.repo, name, revision=self.commit),
                f"{name} of {self.repo}",
                about[1],
                about[0],
                build_hf_headers(token=self._token, library_name="swarmkit"),
                self.retry,
            )
            self._opened.append(mine[name])
        return mine[name]

    def read_range(self, name: str, span: ByteRange) -> bytes:
        """Read some bytes of a file.

        Raises:
            ModelError: they cannot be fetched.
        """
        with self._explained(f"{name} of {self.repo}"):
            return self.remote(name).read(span)

    def _convert(self, part: Part) -> None:
        """Put a part from PyTorch's own files, which can only be fetched as a whole, into the store."""
        with self.store.fetching(self.source, part.label):
            if self.stored(part) is not None:
                return
            tensors: dict[str, Tensor] = {}
            for shard, keys in by_shard([part]).items():
                path = self.find(shard)
                if path is None:
                    raise ModelError(f"{self.repo} on the Hub lacks {shard} of its index; tell its owner.")
                tensors.update(read_from(path, keys, self.repo))
            keep_tensors(self.store, self.source, part.label, tensors)

    def _is_cached(self, part: Part) -> bool:
        shards = set(part.shards.values())
        return not self.is_pickled(part) and all(self._cached(shard) is not None for shard in shards)

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def _about(self, name: str) -> tuple[str, int] | None:
        """Return (ETag, size) of a file, which the Hub is asked for once; None if there is no such file."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        key = key_of(self.source, name, "about")
        if (noted := self.store.noted(key)) is not None:
            etag, size = json.loads(noted)
            return str(etag), int(size)
        with self._explained(f"{name} of {self.repo}"):
            try:
                url = hf_hub_url(self.repo, name, revision=self.commit)
                metadata = get_hf_file_metadata(url, token=self._token)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
        if metadata.size is None:
            raise ModelError(f"The Hub does not say how large {name} of {self.repo} is; try another mirror.")
        self.store.remember(key, json.dumps([metadata.etag or "", metadata.size]).encode())
        return metadata.etag or "", metadata.size

    @contextmanager
    def _bar(self, on_bytes: OnBytes | None) -> Iterator[OnBytes]:
        """Yield a function that reports bytes to the caller, and shows a bar if there are many."""
        bar: Any = None

        def report(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                hidden = not self._progress or total < _BAR_FROM_BYTES
                name = f"Fetching {self.repo}"
                bar = tqdm(total=total, initial=done, desc=name, unit="B", unit_scale=True, disable=hidden)
            elif done != bar.n:
                bar.update(done - bar.n)
            if on_bytes is not None:
                on_bytes(done, total)

        try:
            yield report
        finally:
            if bar is not None:
                bar.close()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn the Hub client's errors into one that says what to do, except those about absent files."""
        from huggingface_hub import errors

        try:
            yield
        except ModelError:
            raise
        except errors.LocalEntryNotFoundError as error:
            raise ModelError(self._unreachable(what)) from error
        except errors.OfflineModeIsEnabled as error:
            raise ModelError(self._unreachable(what)) from error
        except errors.EntryNotFoundError:
            raise
        except errors.GatedRepoError as error:
            raise ModelError(
                f"{self.repo} on the Hub is gated. Accept its terms at https://huggingface.co/{self.repo}, "
                "then set HF_TOKEN or run `hf auth login`."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ModelError(
                f"{self.repo} on the Hub has no revision {self.commit!r}. Check the branch, tag or commit."
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise ModelError(
                f"There is no folder {self.repo!r} here and no such model on the Hub. Check the "
                "spelling (a Hub name looks like Qwen/Qwen3-8B; the packaged model is called tiny-chat). "
                "If it is private or gated, set HF_TOKEN or run `hf auth login`."
            ) from error
        except OSError as error:
            if isinstance(error, errors.HfHubHTTPError | ConnectionError) or error.errno is None:
                raise ModelError(f"{self._unreachable(what)} ({type(error).__name__}: {error})") from error
            raise ModelError(
                f"{what} could not be written to this machine's disk ({error}). Make room, or set "
                "SWARMKIT_STORE_DIR and HF_HOME to folders that can be written to."
            ) from error
        except Exception as error:
            # The client lets connection errors of its HTTP library through, and these differ by version.
            raise ModelError(f"{self._unreachable(what)} ({type(error).__name__}: {error})") from error

    def _unreachable(self, what: str) -> str:
        from huggingface_hub import constants

        if constants.is_offline_mode():
            return (
                f"{what} is neither in the store at {self.store.root} nor in the Hub's cache on this "
                "machine, and HF_HUB_OFFLINE is set. Unset it once to download, or give a local folder."
            )
        return (
            f"{what} could not be fetched from the Hub, nor is it on this machine. "
            "Check the connection and the spelling, give a local folder, or use the packaged model tiny-chat."
        )
