"""The folder of compiled programs.

A package holds a shared object, so that loading one runs what is in it. Hence one is loaded only from a
folder that belongs to this user and that nobody else can open, if it is a file of this user that nobody else
can write to, and if it has the hash that was noted when this user's own process had made it. The hash finds
what a full disk or a crash has left; it is the folder that keeps others out. Nothing that comes from another
peer is ever put here.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import platformdirs
import psutil

from swarmkit.models.compiled.kinds import NotCompiledError

logger = logging.getLogger(__name__)

_PACKAGE, _NOTE, _TRIAL = ".pt2", ".json", ".trial"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def default_folder() -> Path:
    """Where compiled programs are kept, beside the weights that are."""
    root = os.environ.get("SWARMKIT_STORE_DIR") or platformdirs.user_cache_dir("swarmkit")
    return Path(root) / "compiled"


class PackageShelf:
    """Packages by key, in a folder that only this user can open."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if it is not there.

        Raises:
            NotCompiledError: it cannot be made, or others than this user have access to it.
        """
        if not hasattr(os, "getuid"):
            raise NotCompiledError("this system does not say who owns a folder of compiled programs")
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_folder()
        except OSError as error:
            raise NotCompiledError(f"compiled programs cannot be kept in {folder}: {error}") from error

    def find(self, key: str) -> Path | None:
        """A package that was put here under a key; one that was changed since is removed, and not returned.

        Raises:
            NotCompiledError: others than this user have access to the folder, or a process ended while it
                tried the package for the first time; then the package is removed.
        """
        self._check_folder()
        for trial in self.folder.glob(f"{key}.*{_TRIAL}"):
            if not psutil.pid_exists(int(trial.name.split(".")[1])):
                trial.unlink(missing_ok=True)
                self.remove(key)
                raise NotCompiledError(
                    "a server ended while it tried the compiled program, which is removed; the next start "
                    "has it compiled anew"
                )
        package, note = self._paths(key)
        try:
            expected = json.loads(self._read(note))["sha256"]
            if sha256(self._read(package)).hexdigest() == expected:
                return package
            logger.warning("the compiled program %s was changed since it was made, and is removed", package)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the compiled program %s cannot be used, and is removed: %s", package, error)
        self.remove(key)
        return None

    def put(self, key: str, made: Path) -> Path:
        """Keep a package that this user's own process has made, in this folder, under a key."""
        self._check_folder()
        package, note = self._paths(key)
        made.chmod(0o600)
        digest = sha256(self._read(made)).hexdigest()
        made.replace(package)
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".tmp", delete=False) as file:
            json.dump({"sha256": digest}, file)
        Path(file.name).replace(note)
        return package

    @contextmanager
    def trying(self, keys: Iterable[str]) -> Iterator[None]:
        """While programs are loaded and tried: should this process die of one, the next does not load it."""
        trials = [self.folder / f"{key}.{os.getpid()}{_TRIAL}" for key in keys]
        for trial in trials:
            trial.touch()
        try:
            yield
        finally:
            for trial in trials:
                trial.unlink(missing_ok=True)

    def remove(self, key: str) -> None:
        """Keep a package no longer."""
        for path in self._paths(key):
            path.unlink(missing_ok=True)

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """A folder inside this one, for what a compiler writes; it is gone afterwards."""
        with tempfile.TemporaryDirectory(
            dir=self.folder, prefix="making-", ignore_cleanup_errors=True
        ) as path:
            yield Path(path)

    def _paths(self, key: str) -> tuple[Path, Path]:
        if not key.isalnum():
            raise ValueError(f"{key!r} is no name of a compiled program")
        return self.folder / f"{key}{_PACKAGE}", self.folder / f"{key}{_NOTE}"

    def _check_folder(self) -> None:
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & _OTHERS:
            raise NotCompiledError(
                f"{self.folder} is not a folder of this user's that is closed to all others, so that no "
                f"program is loaded from it; with `chmod 700 {self.folder}` it is, if it belongs to you"
            )

    def _read(self, path: Path) -> bytes:
        """Read a file of this user's that others cannot write to."""
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                raise PermissionError(f"{path.name} is not a file of this user's")
            if found.st_mode & _OTHERS_WRITE:
                raise PermissionError(f"others can write to {path.name}")
            return file.read()
