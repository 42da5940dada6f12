"""Where a worker keeps its files, and where programs of the same person find it."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from swarmkit.errors import UsageError

HOME_VARIABLE = "SWARMKIT_WORKER_HOME"
"""An environment variable with a folder that holds everything, in place of the system's usual folders."""
_APP = "swarmkit"
_LONGEST_SOCKET_PATH = 100
"""Bytes; systems take 103 or 107."""


@dataclass(frozen=True)
class WorkerPlaces:
    """Folders of one person's worker.

    Attributes:
        config: holds what the person has chosen.
        state: holds what happened: the contributions, the pause, the log.
        runtime: holds what ends with the worker: the lock, the socket and the token.
        weights: holds the models' weights.
    """

    config: Path
    state: Path
    runtime: Path
    weights: Path

    @classmethod
    def of_this_person(cls) -> WorkerPlaces:
        """Return the system's usual folders, or those inside the folder that `SWARMKIT_WORKER_HOME` names."""
        home = os.environ.get(HOME_VARIABLE)
        return cls.inside(Path(home).expanduser()) if home else cls.usual()

    @classmethod
    def usual(cls) -> WorkerPlaces:
        """Return the system's usual folders."""
        store = os.environ.get("SWARMKIT_STORE_DIR")
        return cls(
            Path(platformdirs.user_config_dir(_APP)),
            Path(platformdirs.user_state_dir(_APP)) / "worker",
            Path(platformdirs.user_runtime_dir(_APP)) / "worker",
            Path(store) if store else Path(platformdirs.user_cache_dir(_APP)) / "store",
        )

    @classmethod
    def inside(cls, home: Path) -> WorkerPlaces:
        """Return folders inside one folder."""
        return cls(home / "config", home / "state", home / "run", home / "weights")

    @property
    def settings(self) -> Path:
        return self.config / "worker.json"

    @property
    def history(self) -> Path:
        return self.state / "contributions.sqlite"

    @property
    def pause(self) -> Path:
        return self.state / "pause.json"

    @property
    def log(self) -> Path:
        return self.state / "worker.log"

    @property
    def lock(self) -> Path:
        return self.runtime / "worker.lock"

    @property
    def handle(self) -> Path:
        """The file from which a program of the same person learns how to reach the worker, and its token."""
        return self.runtime / "control.json"

    @property
    def socket(self) -> Path | None:
        """Where the control API listens; None where there are no Unix sockets, or the path is too long."""
        path = self.runtime / "control.sock"
        if sys.platform == "win32" or len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
            return None
        return path

    def make(self) -> None:
        """Make all folders; the one with the token is for this person only.

        Raises:
            UsageError: the folder for the token belongs to somebody else, or others may enter it.
        """
        for folder in (self.config, self.state):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.runtime.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_private(self.runtime)


def check_private(path: Path) -> None:
    """Check that a file or folder belongs to this person, and that nobody else may use it.

    Windows has no such bits: there a person's folders are closed to others by the system.

    Raises:
        UsageError: it is not private.
        FileNotFoundError: it does not exist.
    """
    if sys.platform == "win32":
        return
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UsageError(
            f"{path} is not private: it must belong to you and be closed to all others. "
            f"Remove it, and start the worker again."
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content so that readers, and a crash, find either the old content or the new one.

    The file is readable by this person only.

    Raises:
        OSError: it cannot be written; the old content is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
