"""Parts of models on this machine's disk: one safetensors file per block, named by the SHA-256 of its
content.

::

    <store>/blobs/<sha256>.safetensors     a part: one block, or what is in no block
    <store>/index/<key>.json               which part of which repository at which commit has which content
    <store>/partial/<key>.part, .json      a part that is being fetched, and which of its bytes are there
    <store>/about/<key>                    headers and hashes of files on the Hub
    <store>/about/<fingerprint>/…          a model's manifest (see `manifest.py`), and what is in it
    <store>/locks, users, quarantine       locks of parts; users of parts; parts that were wrong

Any number of processes share a store. Files appear in `blobs` by renaming, complete. A file is hashed when a
process first opens it, and put aside if it is not what its name says. Above the limit, the parts that were
not read for longest go, except for those that a living process uses: each process keeps a list of these
beside a file that it holds locked, and a lock ends with its process. An evicted part's index entry stays, so
that what is fetched next time can be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs
from filelock import FileLock, Timeout
from pydantic import ByteSize, Field

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.store_format import sha256_of
from swarmkit.settings import SettingsGroup, read_from

logger = logging.getLogger(__name__)

SPARE_BYTES = 1024**3
"""Bytes of the disk that a store without a limit leaves free."""

_SUFFIX = ".safetensors"
Origin = Literal["hub", "peers"]


class StoreSettings(SettingsGroup):
    """The folder in which parts of models are kept."""

    model_config = read_from("SWARMKIT_STORE_")

    dir: Path | None = Field(
        default=None, description="The folder. Without a value, one in the user's cache folder."
    )
    max_bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        description="The largest size of the folder, such as `50GB`. Without a value, 1 GB of the disk "
        "stays free.",
    )


@dataclass(frozen=True)
class StoreEntry:
    """An entry of the index: one part of one source, whether or not its file is here now.

    Attributes:
        source: repository and commit, `name@commit`.
        part: e.g. "block 3".
        content: SHA-256 of its file, in hex.
        size: of its file.
        origin: the source of the part's content.
        read_at: when it was last opened, Unix time.
    """

    source: str
    part: str
    content: str
    size: int
    origin: Origin
    read_at: float


class StoreWriteError(ModelError):
    """The store's disk is full, or it may not be written to."""


def key_of(*names: str) -> str:
    """Return a file name for something that is identified by `names`."""
    return hashlib.sha256("\0".join(names).encode()).hexdigest()[:40]


class BlockStore:
    """The store in one folder. Instances may be used by several threads; a process may have several."""

    def __init__(
        self,
        root: Path | None = None,
        max_bytes: int | None = None,
        *,
        clock: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """Args: root, max_bytes: the settings' (`SWARMKIT_STORE_DIR`, `SWARMKIT_STORE_MAX_BYTES`) if not
        given.
        """
        settings = StoreSettings()
        default = Path(platformdirs.user_cache_dir("swarmkit")) / "store"
        self.root = (root or settings.dir or default).expanduser()
        self.max_bytes = max_bytes if max_bytes is not None else settings.max_bytes
        self._clock = clock
        self._free_bytes = free_bytes
        self._verified: dict[str, tuple[int, ...]] = {}
        self._used: set[str] = set()
        self._user: Path | None = None
        self._user_lock: FileLock | None = None

    # ------------------------------------------------------------------ reading

    def entry(self, source: str, part: str) -> StoreEntry | None:
        """Return the entry of a part; None if there is none."""
        return _read_entry(self._index(source, part))

    def find(self, source: str, part: str) -> Path | None:
        """Return a part's file, verified, and protected from eviction until `release`; None without one."""
        entry = self.entry(source, part)
        if entry is None:
            return None
        path = self.open(entry.content)
        if path is not None:
            # A full disk must not keep a server from reading what is there.
            with self._alone(), contextlib.suppress(StoreWriteError):
                self._write_entry(StoreEntry(**{**asdict(entry), "read_at": self._clock()}))
        return path

    def open(self, content: str) -> Path | None:
        """Return the file with this content, verified and protected from eviction until `release`.

        None if it is not here. A file whose content is not what its name says is put aside.
        """
        path = self.blob(content)
        with self._alone():
            if not path.is_file():
                return None
            try:
                self._use(content)
            except StoreWriteError as error:
                logger.warning("%s may be evicted while it is in use: %s", path.name, error)
        state = state_of(path)
        if self._verified.get(content) != state:
            with path.open("rb") as file:
                actual = sha256_of(file)
            if actual != content:
                self._put_aside(path)
                self.release(content)
                return None
            self._verified[content] = state
        return path

    def release(self, content: str) -> None:
        """Let a file be evicted that this process needs no longer."""
        with self._alone():
            self._used.discard(content)
            self._write_used()

    def blob(self, content: str) -> Path:
        """Return the path of the file with this content, whether or not it is here."""
        return self.root / "blobs" / f"{content}{_SUFFIX}"

    def entries(self) -> list[StoreEntry]:
        """Return all entries, also of files that are not here now."""
        found = [_read_entry(path) for path in sorted((self.root / "index").glob("*.json"))]
        return [entry for entry in found if entry is not None]

    @property
    def used_bytes(self) -> int:
        """Bytes of all files; partial files count with their full size."""
        folders = ("blobs", "partial", "quarantine")
        return sum(size for folder in folders for _, size, _ in _files(self.root / folder))

    # ------------------------------------------------------------------ writing

    @contextmanager
    def fetching(self, *names: str) -> Iterator[None]:
        """Hold the right to fetch one part; other processes and threads that want it wait."""
        lock = self.fetch_lock(*names)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.info("waiting for another server on this machine, which fetches %s", names[-1])
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def fetch_lock(self, *names: str) -> FileLock:
        """Return the lock that `fetching` holds, for callers that must not block their thread."""
        return self._lock(key_of(*names))

    def partial(self, *names: str) -> Path:
        """Return the path at which a part is built; its journal lies beside it as `.json`."""
        return self.root / "partial" / f"{key_of(*names)}.part"

    def reserve(self, partial: Path, size: int) -> None:
        """Make `partial` a file of `size` bytes, keeping those it has, and room for it by evicting others.

        Raises:
            ModelError: the limit does not allow it, whatever is evicted.
        """
        with self._alone():
            have = partial.stat().st_size if partial.is_file() else 0
            if have != size:
                self._make_room(size - have, keep=partial)
                with self.writing(partial.name):
                    partial.parent.mkdir(parents=True, exist_ok=True)
                    with partial.open("ab") as file:
                        file.truncate(size)

    def keep(self, partial: Path, source: str, part: str, content: str, origin: Origin) -> Path:
        """Take over a finished part with its SHA-256 `content`; its file is protected until `release`."""
        blob = self.blob(content)
        with self._alone(), self.writing(part):
            blob.parent.mkdir(parents=True, exist_ok=True)
            size = partial.stat().st_size
            partial.replace(blob)
            partial.with_suffix(".json").unlink(missing_ok=True)
            self._use(content)
            self._write_entry(StoreEntry(source, part, content, size, origin, self._clock()))
        self._verified[content] = state_of(blob)
        return blob

    def link(self, source: str, part: str, content: str, origin: Origin) -> Path | None:
        """Add an entry for a part with this content, if a file with it is here, and return that file."""
        path = self.open(content)
        if path is not None:
            with self._alone():
                size = path.stat().st_size
                self._write_entry(StoreEntry(source, part, content, size, origin, self._clock()))
        return path

    def discard(self, partial: Path) -> None:
        """Delete a part that was being fetched."""
        partial.unlink(missing_ok=True)
        partial.with_suffix(".json").unlink(missing_ok=True)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn errors of writing files of the store into one that says what to do.

        Raises:
            StoreWriteError: the disk is full, or the store may not be written to.
        """
        try:
            yield
        except OSError as error:
            raise StoreWriteError(
                f"the store at {self.root} cannot be written to ({what}: {error.strerror or error}). Make "
                "room on the disk, or set SWARMKIT_STORE_DIR to a folder that can be written to; what is "
                "there already is kept, and a fetch goes on from it"
            ) from error

    # ------------------------------------------------------------------ notes about files on the Hub

    def note(self, name: str, content: bytes) -> Path:
        """Keep something small that never changes; returns its file.

        Raises:
            StoreWriteError: the disk is full, or the store may not be written to.
        """
        path = self.root / "about" / name
        if self.noted(name) != content:
            self._replace(path, content)
        return path

    def remember(self, name: str, content: bytes) -> None:
        """Keep something small that can be found out again, unless the disk is full."""
        with contextlib.suppress(StoreWriteError):
            self.note(name, content)

    def noted(self, name: str) -> bytes | None:
        """Return what was kept under `name`; None if nothing was."""
        try:
            return (self.root / "about" / name).read_bytes()
        except OSError:
            return None

    # ------------------------------------------------------------------ room

    def _make_room(self, nbytes: int, keep: Path) -> None:
        def missing() -> int:
            if self.max_bytes is not None:
                return self.used_bytes + nbytes - self.max_bytes
            self.root.mkdir(parents=True, exist_ok=True)
            return nbytes + SPARE_BYTES - self._free_bytes(self.root)

        if nbytes <= 0 or missing() <= 0:
            return
        used = self._used_by_anybody()
        read_at: dict[str, float] = {}
        for entry in self.entries():
            read_at[entry.content] = max(entry.read_at, read_at.get(entry.content, 0.0))
        candidates = [(-1.0, path) for path, _, _ in _files(self.root / "quarantine")]
        candidates += [
            (at, path)
            for path, _, at in _files(self.root / "partial")
            if path.suffix == ".part" and path != keep
        ]
        for path, _, _ in _files(self.root / "blobs"):
            content = path.name.removesuffix(_SUFFIX)
            if content not in used:
                candidates.append((read_at.get(content, 0.0), path))
        for _, path in sorted(candidates):
            if missing() <= 0:
                return
            self._evict(path)
        if missing() > 0:
            limit = "the disk is full" if self.max_bytes is None else f"its limit is {self.max_bytes} bytes"
            raise ModelError(
                f"{nbytes} more bytes do not fit into the store at {self.root}: {limit}, and what is left is "
                "in use. Serve fewer blocks, raise SWARMKIT_STORE_MAX_BYTES, or move SWARMKIT_STORE_DIR to a "
                "larger disk."
            )

    def _evict(self, path: Path) -> None:
        if path.suffix != ".part":
            path.unlink(missing_ok=True)
            return
        lock = self._lock(path.stem)
        with contextlib.suppress(Timeout), lock.acquire(blocking=False):  # otherwise it is being fetched
            self.discard(path)

    # ------------------------------------------------------------------ which process uses which part

    def _use(self, content: str) -> None:
        if content not in self._used:
            self._used.add(content)
            self._write_used()

    def _write_used(self) -> None:
        if self._user is None:
            if not self._used:
                return
            self._user = self.root / "users" / f"{os.getpid()}-{uuid.uuid4().hex}.json"
            self._user.parent.mkdir(parents=True, exist_ok=True)
            self._user_lock = FileLock(self._user.with_suffix(".lock"), thread_local=False)
            self._user_lock.acquire()
            weakref.finalize(self, _end_own_use, self._user, self._user_lock, os.getpid())
        self._replace(self._user, json.dumps(sorted(self._used)).encode())

    def _used_by_anybody(self) -> set[str]:
        used = set(self._used)
        for path in (self.root / "users").glob("*.json"):
            if path == self._user:
                continue
            lock = FileLock(path.with_suffix(".lock"))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                with contextlib.suppress(OSError, ValueError):
                    used |= set(json.loads(path.read_text()))
            else:
                _end_use(path, lock)  # its process has ended
        return used

    # ------------------------------------------------------------------ files

    def _index(self, source: str, part: str) -> Path:
        return self.root / "index" / f"{key_of(source, part)}.json"

    def _write_entry(self, entry: StoreEntry) -> None:
        self._replace(self._index(entry.source, entry.part), json.dumps(asdict(entry)).encode())

    def _replace(self, path: Path, content: bytes) -> None:
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with self.writing(path.name):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                scratch.write_bytes(content)
                scratch.replace(path)
            except OSError:
                scratch.unlink(missing_ok=True)
                raise

    def _put_aside(self, path: Path) -> None:
        logger.warning("%s is damaged; it is put aside and fetched again", path)
        with self._alone():
            target = self.root / "quarantine" / f"{path.name}.{uuid.uuid4().hex[:8]}"
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another process was quicker
                path.replace(target)

    def _lock(self, name: str) -> FileLock:
        path = self.root / "locks" / f"{name}.lock"
        with self.writing("a lock"):
            path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path, thread_local=False)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from changing the store. Held for moments only, never while bytes move."""
        lock = self._lock("store")
        with self.writing("a lock"):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _end_own_use(path: Path, lock: FileLock, pid: int) -> None:
    if os.getpid() == pid:  # and not a fork, which inherits this duty but not the use
        _end_use(path, lock)


def _end_use(path: Path, lock: FileLock) -> None:
    path.unlink(missing_ok=True)
    lock.release()
    path.with_suffix(".lock").unlink(missing_ok=True)


def _read_entry(path: Path) -> StoreEntry | None:
    try:
        return StoreEntry(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def state_of(path: Path) -> tuple[int, ...]:
    """Size, time of change and number of a file: while these stay, its content is taken to stay, too."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    """(path, size, changed at) of a folder's files; those that vanish meanwhile are left out."""
    found: list[tuple[Path, int, float]] = []
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(OSError):
                status: Any = path.stat()
                found.append((path, status.st_size, status.st_mtime))
    return found
