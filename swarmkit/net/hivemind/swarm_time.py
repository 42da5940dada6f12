"""What other peers of the swarm say that the time is, where this computer's clock is wrong.

Records are dated, and peers drop what has expired. A peer whose clock is wrong by more than a record lasts
would be alone: its own records would be dropped, and so would it drop those of others. So peers ask each
other for the time when they meet, when their clock was set, and now and then.

The peers that this one was told to join decide, since it trusts them with its way into the swarm anyway: the
clock is believed where it agrees with any of them. Where there are none, because this peer began the swarm,
it is the median of all peers, itself included, so that strangers must be the majority to change the date.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping
from statistics import median_low

from swarmkit.clock import Clock, SystemClock

logger = logging.getLogger(__name__)

TOLERANCE_S = 3.0
"""Clocks that differ by no more than this are taken to agree."""
_ASK_PERIOD_S = 30.0
_REMEMBERED_PEERS = 32


def agreed_offset(offsets: Mapping[str, float], trusted: Collection[str]) -> float:
    """Return by how many seconds this computer's date is early, as peers see it; 0 = it is right.

    Args:
        offsets: by how much the date of each peer is later than this computer's.
        trusted: the peers that this one was told to join.
    """
    of_trusted = [offset for peer_id, offset in offsets.items() if peer_id in trusted]
    agreed = min(of_trusted, key=abs) if of_trusted else median_low([0.0, *offsets.values()])
    return 0.0 if abs(agreed) <= TOLERANCE_S else agreed


class SwarmTime:
    """Corrects a `SystemClock` by the times that peers tell; any other clock stays as it is."""

    def __init__(self, clock: Clock, trusted: Collection[str]) -> None:
        """Args: trusted: the ids of the peers that this one was told to join."""
        self._clock = clock if isinstance(clock, SystemClock) else None
        self._trusted = frozenset(trusted)
        self._offsets: OrderedDict[str, float] = OrderedDict()
        self._lead = self._measure_lead()
        self._asked_at = clock.now()

    def note(self, peer_id: str, date: float, asked_at: float, answered_at: float) -> None:
        """Take in the date that a peer told.

        Args: asked_at, answered_at: this computer's date, uncorrected, before and after.
        """
        clock = self._clock
        if clock is None or not 0.0 < date < 1e11:
            return
        self._offsets.pop(peer_id, None)
        self._offsets[peer_id] = date - (asked_at + answered_at) / 2
        while len(self._offsets) > _REMEMBERED_PEERS:
            self._offsets.popitem(last=False)
        agreed = agreed_offset(self._offsets, self._trusted)
        if abs(agreed - clock.correction_s) > TOLERANCE_S:
            clock.correct(agreed)
            if agreed:
                logger.warning(
                    "this computer's clock is wrong by %.0f s, other peers say; set it right. Until then "
                    "swarmkit uses the time of the swarm",
                    -agreed,
                )

    def should_ask(self) -> bool:
        """Whether it is time to ask peers for the date: the clock was set, or the last time was long ago."""
        clock = self._clock
        if clock is None:
            return False
        lead, now = self._measure_lead(), clock.now()
        was_set = abs(lead - self._lead) > TOLERANCE_S
        if was_set:
            self._offsets.clear()  # they are differences to a clock that is no more
        if was_set or now - self._asked_at > _ASK_PERIOD_S:
            self._lead, self._asked_at = lead, now
            return True
        return False

    def _measure_lead(self) -> float:
        """By how much the computer's date is ahead of its steady clock."""
        return 0.0 if self._clock is None else self._clock.uncorrected() - self._clock.now()
