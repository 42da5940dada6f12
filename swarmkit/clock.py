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
    """The computer's own clock, whose date is corrected where the swarm agrees that it is wrong.

    `time` is the standard library's function until then, and another one afterwards. So ask the clock for it
    each time, and do not keep it.

    Attributes:
        correction_s: seconds that are added to the computer's date.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.correct(0.0)

    def correct(self, seconds: float) -> None:
        """Add so many seconds to the computer's date from now on."""
        self.correction_s = seconds
        self.time: Callable[[], float] = (lambda: time.time() + seconds) if seconds else time.time

    def uncorrected(self) -> float:
        """Return Unix time in seconds as the computer has it."""
        return time.time()


SYSTEM_CLOCK = SystemClock()
"""There is one per process, as the computer has one clock."""


def system_date() -> float:
    """Return Unix time in seconds by `SYSTEM_CLOCK`, also after it was corrected."""
    return SYSTEM_CLOCK.time()
