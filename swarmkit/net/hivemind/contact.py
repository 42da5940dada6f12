"""Whether this peer is in contact with the swarm, and where it may find the swarm again.

hivemind's routing table forgets every peer that does not answer. After a short outage it is empty, and
nothing fills it again. So this peer remembers addresses by itself: those that it was given to join, and
those of the peers that it reached lately.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from swarmkit.clock import Clock

_REMEMBERED_PEERS = 64
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_PEERS_AT_ONCE = 8


class Contact:
    """Remembers when a peer of the swarm was heard last, and the addresses of some peers."""

    def __init__(self, clock: Clock, initial_peers: Sequence[str]) -> None:
        self._clock = clock
        self._initial = tuple(initial_peers)
        self._reached: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._heard_now: float | None = None
        self._heard_at: float | None = None
        self._turn = 0
        self._pause_s = _FIRST_PAUSE_S

    @property
    def initial_ids(self) -> frozenset[str]:
        """The ids of the peers that this one was told to join."""
        return frozenset(address.rpartition("/p2p/")[2] for address in self._initial)

    @property
    def is_expected(self) -> bool:
        """Whether there are other peers: this peer was to join them, or has heard them."""
        return bool(self._initial) or self._heard_now is not None

    @property
    def heard_at(self) -> float | None:
        """The Unix time in seconds at which a peer was heard last; None = never."""
        return self._heard_at

    def heard_since(self, moment: float) -> bool:
        """Whether any peer was heard since `moment` (on the monotonic clock)."""
        return self._heard_now is not None and self._heard_now >= moment

    def note_heard(self) -> None:
        """Note that a peer of the swarm asked or answered something."""
        self._heard_now = self._clock.now()
        self._heard_at = self._clock.time()
        self._pause_s = _FIRST_PAUSE_S

    def note_reached(self, peer_id: str, addresses: Sequence[str]) -> None:
        """Remember where a peer was reached."""
        if addresses:
            self._reached[peer_id] = tuple(addresses)
            self._reached.move_to_end(peer_id)
            while len(self._reached) > _REMEMBERED_PEERS:
                self._reached.popitem(last=False)

    def candidates(self) -> dict[str, tuple[str, ...]]:
        """Choose the peers to try next, with their addresses; another few of them in each turn.

        The initial peers are always among them, since they are the ones that are meant to stay. Each is tried
        where it was reached last, too: one that was started again may listen at another port.
        """
        known: dict[str, tuple[str, ...]] = {}
        for address in self._initial:
            peer_id = address.rpartition("/p2p/")[2]
            known[peer_id] = (*known.get(peer_id, self._reached.get(peer_id, ())), address)
        others = [peer_id for peer_id in reversed(self._reached) if peer_id not in known]
        first = self._turn * _PEERS_AT_ONCE % max(len(others), 1)
        self._turn += 1
        for peer_id in (others[first:] + others[:first])[:_PEERS_AT_ONCE]:
            known[peer_id] = self._reached[peer_id]
        return known

    def next_pause_s(self) -> float:
        """Return how many seconds to wait until the next attempt; the pause doubles until a peer is heard."""
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, _LONGEST_PAUSE_S)
        return pause_s
