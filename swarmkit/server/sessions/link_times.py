"""How far the servers with the next blocks are, as seen when sessions were linked to them."""

from __future__ import annotations

from collections.abc import Callable

from swarmkit.ewma import Ewma
from swarmkit.net.registry.records import MAX_LINKS, MeasuredLink

_GAIN = 0.25


class LinkTimes:
    """Round trips from this server to the next ones. Nothing is sent to measure them."""

    def __init__(self, now: Callable[[], float]) -> None:
        """Args: now: seconds on this server's clock."""
        self._now = now
        self._seen: dict[str, tuple[float, Ewma]] = {}

    def note(self, service_id: str, seconds: float) -> None:
        """A question to a server that computes nothing for it was answered after so many seconds."""
        _, average = self._seen.pop(service_id, (0.0, None))
        if average is None:
            average = Ewma(seconds, seconds / 2, _GAIN)
        else:
            average.observe(seconds)
        self._seen[service_id] = self._now(), average
        while len(self._seen) > MAX_LINKS:
            del self._seen[next(iter(self._seen))]

    @property
    def latest(self) -> tuple[MeasuredLink, ...]:
        """Those that were used last, with the age of each."""
        now = self._now()
        return tuple(
            MeasuredLink(name, min(average.mean, 3600.0), now - at)
            for name, (at, average) in self._seen.items()
        )
