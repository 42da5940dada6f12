"""How long work takes on a device that is handed work ahead of time.

An accelerator queues the work that it is given; a host that waited for each result could not have the next
work ready. So the host puts *marks* between pieces of work, and reads them once the device has passed them::

    host      |work 1|work 2|        |work 3|            waits only here: two pieces are under way
    device      |── work 1 ──|── work 2 ──|── work 3 ──|
    marks       ^            ^ ^          ^

A CPU has done its work when the call returns, and needs no marks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

K = TypeVar("K")

MOST_UNDER_WAY = 2
"""Pieces of work at a device: one that runs and one that is ready. The host waits before it gives a third."""


class Mark(Protocol):
    """A point in a device's work; `torch.Event` is one."""

    def record(self) -> Any:
        """Put the mark behind all work that the device was given."""

    def query(self) -> bool:
        """Whether the device has passed the mark."""

    def synchronize(self) -> Any:
        """Wait until the device has passed the mark."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this mark to a later one, both of which the device has passed."""


class DeviceWatch(Generic[K]):
    """Learns how long pieces of work took, without holding the device up. Belongs to one thread."""

    def __init__(
        self, new_mark: Callable[[], Mark], learn: Callable[[K, float], None], most: int = MOST_UNDER_WAY
    ) -> None:
        """Args:
        learn: called with what `end` was told, and the seconds that the work took on the device.
        most: pieces of work that may be under way.
        """
        self._new_mark = new_mark
        self._learn = learn
        self._most = most
        self._under_way: deque[tuple[K, Mark, Mark]] = deque()

    def begin(self) -> Mark:
        """Mark the beginning of a piece of work; waits while `most` pieces are under way."""
        while len(self._under_way) >= self._most:
            self._under_way[0][2].synchronize()
            self.catch_up()
        mark = self._new_mark()
        mark.record()
        return mark

    def end(self, begun: Mark, what: K) -> None:
        """Mark the end of a piece of work, all of which the device was given; not for one that failed."""
        mark = self._new_mark()
        mark.record()
        self._under_way.append((what, begun, mark))

    def catch_up(self) -> None:
        """Report all work that is done by now to `learn`; never waits."""
        while self._under_way and self._under_way[0][2].query():
            what, begun, ended = self._under_way.popleft()
            self._learn(what, begun.elapsed_time(ended) / 1e3)
