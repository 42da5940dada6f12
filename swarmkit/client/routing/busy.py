"""Peers that said they have no room are left alone for as long as they said. Takes a clock.

To be busy is no failure, and no session is lost by it. A busy peer costs a route the time until it has
room, so that another one is used if it is worth it, and else the one that is free first. Where a session of
this client leaves a peer, that peer has room at once, whatever it said before: of the sessions that wait for
it, one that has begun asks it before those that have not, and among equals the one that waits for longest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import anyio

_LEAST_S = 0.1
_MOST_S = 60.0
_MOST_TIMES = 8.0
_FORGOTTEN_S = 10.0
"""A peer that was not busy for so long is treated as if it had never been."""


@dataclass
class _Busy:
    count: int
    until: float


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A session that waits for one of some peers to have room.

    Attributes:
        since: when it began to.
        has_begun: whether servers have computed some of it, which would be lost with it.
    """

    peer_ids: Collection[str]
    since: float
    has_begun: bool
    told: anyio.Event


class BusyPeers:
    """Which peers are busy, and until when; and which sessions wait for them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._peers: dict[str, _Busy] = {}
        self._waiting: list[_Waiting] = []

    def note(self, peer_id: str, retry_after_s: float) -> float:
        """A peer says that it has no room before so many seconds; returns for how long it is left alone.

        A peer that says so repeatedly is asked less often than that: at least after 0.1, 0.2, 0.4, … seconds,
        up to 8 times what it says. Where many sessions wait for a peer, most are refused again though others
        were let in meanwhile, and its room must not stay empty for long.
        """
        old = self._peers.get(peer_id)
        now = self._clock()
        count = 1
        if old is not None and now < old.until + _FORGOTTEN_S:
            # While it is left alone, other sessions are told the same.
            count = old.count + (old.until <= now)
        least_s = min(_LEAST_S * 2.0 ** min(count - 1, 30), _MOST_TIMES * max(retry_after_s, _LEAST_S))
        seconds = min(max(retry_after_s, least_s), _MOST_S)
        self._peers[peer_id] = _Busy(count, now + seconds)
        return seconds

    def wait_s(self, peer_id: str) -> float:
        """For `routing.route_cost`: how long it still has no room."""
        busy = self._peers.get(peer_id)
        return max(0.0, busy.until - self._clock()) if busy is not None else 0.0

    def has_room(self, peer_id: str) -> None:
        """A session of this client has left a peer: another one may take its place."""
        self._peers.pop(peer_id, None)
        waiting = [one for one in self._waiting if peer_id in one.peer_ids and not one.told.is_set()]
        if waiting:
            min(waiting, key=lambda one: (not one.has_begun, one.since)).told.set()

    def is_awaited(self, peer_ids: Collection[str]) -> bool:
        """Whether a session that has begun waits for one of these peers, before which no new one asks it."""
        return any(
            one.has_begun and any(peer_id in one.peer_ids for peer_id in peer_ids) for one in self._waiting
        )

    async def wait(
        self, peer_ids: Collection[str], since: float, seconds: float, *, has_begun: bool = False
    ) -> None:
        """Wait until a peer has room for this session, as far as can be known here, or for so many seconds.

        Args:
            since: when the session began to wait, on the clock; whoever waits for longest comes first.
            has_begun: whether servers have computed some of it; it comes before all that have not begun.
        """
        one = _Waiting(peer_ids, since, has_begun, anyio.Event())
        self._waiting.append(one)
        try:
            with anyio.move_on_after(seconds):
                await one.told.wait()
        finally:
            self._waiting.remove(one)
