"""The clock that is handed to everything which measures or compares times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Tells durations and dates; a simulation hands in one that is not the computer's."""

    @property
    def now(self) -> Callable[[], float]:
        """Returns seconds since an arbitrary moment; never goes backward. For durations and deadlines."""

    @property
    def time(self) -> Callable[[], float]:
        """Returns Unix time in seconds, which may be set back. For what other peers or people read."""


class SystemClock:
    """The computer's own clock."""

    now = staticmethod(time.perf_counter)
    time = staticmethod(time.time)


SYSTEM_CLOCK = SystemClock()
