"""Clocks that tests set by hand."""

from __future__ import annotations

from swarmkit.clock import SystemClock


class SetClock(SystemClock):
    """Stands still until it is set."""

    seconds = 0.0

    def now(self) -> float:  # type: ignore[override]
        return self.seconds


class SetTime:
    """The same for what is handed a function."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
