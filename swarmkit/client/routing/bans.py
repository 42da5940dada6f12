"""Peers that failed are avoided for a while, which grows with repeated failure.

A peer whose connection was lost may be gone, though its announcement outlives it for half a minute. So it
comes after all others until it has announced itself anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from swarmkit.errors import PeerError
from swarmkit.net.registry.records import Announcement

_COSTS = 4.0
"""A ban lasts so many times what the failure cost."""
_EXCLUSION_S = 10.0
"""A server that refuses this client altogether is avoided for at least so long: lists seldom change."""
PENALTY_S = 1e6
"""Seconds that are added to the cost of a banned peer: it is used only where no other peer has the blocks."""
_DOUBT_S = 10.0
"""Seconds that are added for each block to the cost of a peer that may be gone: more than the wait for any
that works, and less than the wait for one that is busy for long.
"""


@dataclass
class _Failures:
    count: int
    until: float
    excludes: bool = False


@dataclass
class _LostConnection:
    """A connection that was lost.

    Attributes:
        sequence: of the latest announcement from before; None until the first look-up that began afterwards.
    """

    at: float
    sequence: int | None = None


class Bans:
    """Which peers failed, how often in a row, and until when to avoid them: 2, 4, 8, … seconds by default.

    A failure that took long to see, such as silence, bans for longer: a peer that is asked again as soon as
    it has wasted some seconds wastes most of the time.
    """

    def __init__(self, first_s: float, longest_s: float, clock: Callable[[], float]) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self.failures: dict[str, _Failures] = {}
        """By peer id; without those that have worked since."""
        self.convicted: dict[str, float] = {}
        """Peers whose outputs were found wrong, and until when they are avoided, whatever they do."""

        self._losses: dict[str, _LostConnection] = {}
        """Peers that have not announced themselves since a connection to them was lost."""

    def failed(self, peer_id: str, cost_s: float = 0.0, error: PeerError | None = None) -> float:
        """Note a failure that took `cost_s` seconds to see; returns for how many seconds the peer is avoided.

        While it is avoided nothing is added: one crash is met by all sessions that used the peer.

        Args: error: how it failed; None = it answered, and was of no use.
        """
        excludes = error is not None and error.is_exclusion
        if error is not None and error.is_loss:
            self._losses[peer_id] = _LostConnection(self._clock())
        if self.is_banned(peer_id):
            entry = self.failures[peer_id]
            entry.excludes |= excludes
            return entry.until - self._clock()
        count = self.failures[peer_id].count + 1 if peer_id in self.failures else 1
        first_s = max(self._first_s, _EXCLUSION_S) if excludes else self._first_s
        seconds = min(max(first_s * 2.0 ** min(count - 1, 30), _COSTS * cost_s), self._longest_s)
        self.failures[peer_id] = _Failures(count, self._clock() + seconds, excludes)
        return seconds

    def worked(self, peer_id: str) -> None:
        """Note a success: the next failure starts from the beginning."""
        if not (self.convicted and self.is_convicted(peer_id)):
            self.failures.pop(peer_id, None)
            self._losses.pop(peer_id, None)

    def heard(self, announcements: Mapping[str, Announcement], asked_at: float) -> None:
        """Note what a look-up found that began at `asked_at`: those that announced themselves are back.

        The first look-up after a loss shows which announcement is the latest from before.

        Args: announcements: the latest of each peer, by peer id.
        """
        for peer_id, loss in list(self._losses.items()):
            latest = announcements.get(peer_id)
            if latest is None or (loss.sequence is not None and latest.sequence > loss.sequence):
                del self._losses[peer_id]
            elif loss.sequence is None and asked_at >= loss.at:
                loss.sequence = latest.sequence

    def convict(self, peer_id: str, seconds: float) -> None:
        """Avoid a peer whose outputs were found wrong; that it seems to work does not change it."""
        until = self._clock() + seconds
        self.convicted[peer_id] = until
        count = self.failures[peer_id].count if peer_id in self.failures else 0
        self.failures[peer_id] = _Failures(count + 1, until)

    def is_convicted(self, peer_id: str) -> bool:
        """Whether its outputs were found wrong lately."""
        if self.convicted.get(peer_id, 0.0) > self._clock():
            return True
        self.convicted.pop(peer_id, None)
        return False

    def is_banned(self, peer_id: str) -> bool:
        entry = self.failures.get(peer_id)
        return entry is not None and entry.until > self._clock()

    def is_doubtful(self, peer_id: str) -> bool:
        """Whether the peer is banned, or may be gone."""
        return peer_id in self._losses or self.is_banned(peer_id)

    def excludes(self, peer_id: str) -> bool:
        """Whether the peer has lately refused this one altogether."""
        return self.is_banned(peer_id) and self.failures[peer_id].excludes

    def penalty_s(self, peer_id: str) -> float:
        """For `routing.route_cost`. Peers that may be gone come after all others, and after them the banned
        ones, of which the one that failed least often comes first.
        """
        if self.is_banned(peer_id):
            return PENALTY_S * self.failures[peer_id].count
        return _DOUBT_S if peer_id in self._losses else 0.0
