"""Before the computer sleeps, logind waits for those who ask it to: a few seconds for sessions to move."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

from swarmkit.worker.sensing.dbus import SYSTEM, desktop_bus
from swarmkit.worker.sensing.probes import UnknownError

_LOGIND = "org.freedesktop.login1"
_PATH = "/org/freedesktop/login1"
_MANAGER = f"{_LOGIND}.Manager"


class SleepWatch(Protocol):
    """Tells when the computer goes to sleep, and when it is awake again."""

    def begin(self, on_change: Callable[[bool], None]) -> None:
        """Call `on_change(True)` before each sleep and `on_change(False)` after it, from another thread."""

    def allow(self) -> None:
        """What was to be done before the sleep is done."""

    def end(self) -> None:
        """Watch no longer."""


class LogindSleepWatch:
    """Asks logind. Where there is none, nothing is told, and a sleep is seen afterwards by its length."""

    def __init__(self) -> None:
        self._lock: int | None = None
        self._changing = threading.Lock()
        self._on_change: Callable[[bool], None] = lambda going: None

    def begin(self, on_change: Callable[[bool], None]) -> None:
        """See `SleepWatch.begin`."""
        self._on_change = on_change
        try:
            desktop_bus().follow(SYSTEM, _MANAGER, "PrepareForSleep", self._told)
            self._hold()
        except UnknownError:
            return

    def allow(self) -> None:
        """See `SleepWatch.allow`."""
        with self._changing:
            lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def end(self) -> None:
        """See `SleepWatch.end`."""
        self._on_change = lambda going: None
        self.allow()

    def _told(self, body: list[Any]) -> None:
        going = bool(body[0])
        if not going:
            # Asking waits for the thread that tells this, so another one does.
            threading.Thread(target=self._hold, name="swarmkit-sleep", daemon=True).start()
        self._on_change(going)

    def _hold(self) -> None:
        """Have logind wait before the next sleep."""
        asked = "sleep", "swarmkit", "Sessions move to other computers", "delay"
        try:
            found = desktop_bus().call_with_files(SYSTEM, _LOGIND, _PATH, _MANAGER, "Inhibit", "ssss", *asked)
        except UnknownError:
            return
        self.allow()
        with self._changing:
            self._lock = found[0] if found else None
