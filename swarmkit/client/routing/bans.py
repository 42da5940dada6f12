"""Peers that failed are left aside for a while that grows with repeated failure. Takes a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PENALTY_S = 1e6
"""Seconds that a banned peer seems to be away: it is used only where nobody else holds the blocks."""


@dataclass
class _Failures:
    count: int
    until: float


class Bans:
    """Who failed, how often in a row, and until when to avoid them: 2, 4, 8, … seconds by default."""

    def __init__(self, first_s: float, longest_s: float, clock: Callable[[], float]) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._failures: dict[str, _Failures] = {}

    def failed(self, peer_id: str) -> float:
        """Note a failure; returns for how many seconds the peer is left aside.

        While it is left aside nothing is added: one crash is met by all sessions that used the peer.
        """
        if self.is_banned(peer_id):
            return self._failures[peer_id].until - self._clock()
        count = self._failures[peer_id].count + 1 if peer_id in self._failures else 1
        seconds = min(self._first_s * 2.0 ** min(count - 1, 30), self._longest_s)
        self._failures[peer_id] = _Failures(count, self._clock() + seconds)
        return seconds

    def worked(self, peer_id: str) -> None:
        """Note a success: the next failure starts from the beginning."""
        self._failures.pop(peer_id, None)

    def is_banned(self, peer_id: str) -> bool:
        entry = self._failures.get(peer_id)
        return entry is not None and entry.until > self._clock()

    def penalty_s(self, peer_id: str) -> float:
        """For `routing.route_cost`. Among banned peers the one that failed least often comes first."""
        return PENALTY_S * self._failures[peer_id].count if self.is_banned(peer_id) else 0.0
