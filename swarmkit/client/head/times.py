"""Where the output layer is quicker to have: here or at a server. Pure, over what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from swarmkit.ewma import Ewma

_GAIN = 0.2
_RETRY_S = 30.0
"""The way that was slower is measured again after so long: machines become busy, and idle again."""
_LOCAL_FIRST = 2
"""Passes that are measured here before servers are asked: the first one reads the weights from disk."""

Way = Literal["local", "top", "complete"]
"""Here; or at a server, which tells the largest logits of each row, or all of them."""


@dataclass
class _Measured:
    seconds: Ewma
    at: float
    """When it was measured last, on the client's clock."""
    count: int = 1


@dataclass
class HeadTimes:
    """Seconds that one pass of the output layer takes, by way, of few rows and of many."""

    _known: dict[tuple[Way, bool], _Measured] = field(default_factory=dict)

    def note(self, way: Way, rows: int, seconds: float, now: float) -> None:
        """A pass of so many rows took so long."""
        key = way, rows > 1
        measured = self._known.get(key)
        if measured is None:
            self._known[key] = _Measured(_mean_from(seconds), now)
            return
        if measured.count == 1:  # the first pass counts no longer once there is a second one
            measured.seconds = _mean_from(seconds)
        else:
            measured.seconds.observe(seconds)
        measured.at = now
        measured.count += 1

    def note_failure(self, way: Way, rows: int, seconds: float, now: float) -> None:
        """A server did not answer, which took so long; it is left alone for a while."""
        measured = self._known.setdefault((way, rows > 1), _Measured(_mean_from(seconds), now))
        measured.seconds, measured.at = _mean_from(max(seconds, measured.seconds.mean)), now

    def is_quicker(self, way: Way, rows: int, claimed_s: float, now: float) -> bool:
        """Whether to have a pass of so many rows done in this way, and not here.

        Args: claimed_s: what the server says that it takes, with the way there and back.
        """
        local = self._known.get(("local", rows > 1))
        if local is None or local.count < _LOCAL_FIRST:
            return False
        served = self._known.get((way, rows > 1))
        if served is None:
            return claimed_s < local.seconds.mean
        is_quicker = served.seconds.mean < local.seconds.mean
        stale = local if is_quicker else served
        if now - stale.at > _RETRY_S:
            stale.at = now  # so that one pass tells, and not all threads' at once
            return not is_quicker
        return is_quicker


def _mean_from(seconds: float) -> Ewma:
    return Ewma(seconds, 0.0, _GAIN)
