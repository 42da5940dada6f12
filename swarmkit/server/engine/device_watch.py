"""How long work takes on a device that is handed work ahead of time.

An accelerator takes what it is given and goes on by itself; a host that waited for each result could not have
the next work ready. So *marks* are put between pieces of work, and read when the device has come past them::

    host      |work 1|work 2|        |work 3|            waits only here: most pieces under way
    device      |── work 1 ──|── work 2 ──|── work 3 ──|
    marks       ^            ^ ^          ^

A CPU has done its work when the call returns, and a mark there is the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

K = TypeVar("K")

MOST_UNDER_WAY = 2
"""Pieces of work at a device: one that runs and one that is ready. What comes next waits for all of them."""


class Mark(Protocol):
    """A point in a device's work; `torch.Event` is one."""

    def record(self) -> Any:
        """Put it behind all that the device was given."""

    def query(self) -> bool:
        """Whether the device has come past it."""

    def synchronize(self) -> Any:
        """Wait until it has."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to a later one; both have been passed."""


class _Now:
    """A mark on the host's own way."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.at = 0.0

    def record(self) -> None:
        self.at = self._now()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: _Now) -> float:
        return (end_event.at - self.at) * 1e3


def marks_of(device: torch.device, now: Callable[[], float]) -> Callable[[], Mark]:
    """What makes marks for a device; `now` tells the time on the host, in seconds."""
    if device.type == "cpu":
        return lambda: _Now(now)
    return lambda: torch.Event(device, enable_timing=True)


class DeviceWatch(Generic[K]):
    """Learns how long pieces of work took, without holding the device up. Belongs to one thread."""

    def __init__(
        self, new_mark: Callable[[], Mark], learn: Callable[[K, float], None], most: int = MOST_UNDER_WAY
    ) -> None:
        """Args: learn: called with what `end` was told, and the seconds that it took on the device."""
        self._new_mark = new_mark
        self._learn = learn
        self._most = most
        self._under_way: deque[tuple[K, Mark, Mark]] = deque()

    def begin(self) -> Mark:
        """Before a piece of work; waits while as much as may be is under way already."""
        while len(self._under_way) >= self._most:
            self._under_way[0][2].synchronize()
            self.catch_up()
        mark = self._new_mark()
        mark.record()
        return mark

    def end(self, begun: Mark, what: K) -> None:
        """All of a piece of work has been given to the device. One that failed is not told of."""
        mark = self._new_mark()
        mark.record()
        self._under_way.append((what, begun, mark))

    def catch_up(self) -> None:
        """Learn of all that has been done by now; never waits."""
        while self._under_way and self._under_way[0][2].query():
            what, begun, ended = self._under_way.popleft()
            self._learn(what, begun.elapsed_time(ended) / 1e3)
