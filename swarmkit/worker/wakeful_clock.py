"""A clock whose durations count the time that the computer sleeps, and what tells that it was set."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from swarmkit.clock import SYSTEM_CLOCK, Clock

_SLEPT_S = 20.0
"""A worker that was not asked for so long has slept: its loop runs every second otherwise."""
_SET_S = 5.0


class WakefulClock:
    """The computer's own clock. On systems that have no such durations they stand still during sleep."""

    @property
    def time(self) -> Callable[[], float]:
        """See `Clock.time`."""
        return SYSTEM_CLOCK.time

    def now(self) -> float:
        """See `Clock.now`."""
        return time.clock_gettime(_COUNTER) if _COUNTER is not None else time.monotonic()


_COUNTER = getattr(time, "CLOCK_BOOTTIME", None)


@dataclass(frozen=True)
class Jump:
    """What happened between two looks at a clock: how long the computer slept, and how far it was set."""

    slept_s: float = 0.0
    set_s: float = 0.0


class ClockWatch:
    """Looks at a clock once a second or so."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = clock.now(), clock.time()

    def look(self) -> Jump:
        """Return what has happened since the last look."""
        last, self._last = self._last, (self._clock.now(), self._clock.time())
        passed, by_date = self._last[0] - last[0], self._last[1] - last[1]
        set_s = by_date - passed
        slept_s = passed if passed > _SLEPT_S else 0.0
        return Jump(slept_s, set_s if abs(set_s) > _SET_S else 0.0)
