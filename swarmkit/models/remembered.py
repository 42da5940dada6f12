"""Values that were found out once on this machine, in a file of the user's cache folder.

Only speed is lost where the file cannot be written, or where its content is damaged: what it does not hold is
found out again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

_LOCKED_S = 5.0
"""The longest wait for others who remember something; each takes milliseconds."""
_LOCK_POLL_S = 0.01
MOST_REMEMBERED = 4096
"""Values that are kept; those that were remembered longest ago go first."""


class Remembered:
    """Values by key, made of JSON types, which all of this user's processes share."""

    def __init__(self, name: str) -> None:
        """Args: name: of the file."""
        self._name = name

    @property
    def path(self) -> Path:
        """Of the file, which may not exist."""
        return Path(platformdirs.user_cache_dir("swarmkit")) / self._name

    def recall(self, key: str) -> Any:
        """Return the value that was remembered under `key`; None if there is none."""
        return self._content().get(key)

    def remember(self, key: str, value: Any) -> None:
        """Remember `value` under `key`, if the cache folder can be written to.

        What others remember at the same time stays, and whoever reads meanwhile reads the file as it was
        before.
        """
        path = self.path
        scratch = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCKED_S, poll_interval=_LOCK_POLL_S):
                content = self._content()
                content.pop(key, None)
                content[key] = value
                newest = dict(list(content.items())[-MOST_REMEMBERED:])
                scratch.write_text(json.dumps(newest), encoding="utf-8")
                scratch.replace(path)
        except (OSError, NotImplementedError):  # the lock takes too long, or the file system has none
            with contextlib.suppress(OSError):  # the folder may be none
                scratch.unlink(missing_ok=True)

    def _content(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}
