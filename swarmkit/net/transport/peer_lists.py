"""Lists of the peers that a client or a server deals with, and what they say about their whole peer. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class PeerLists:
    """Which peers are dealt with: those that are allowed, or all if none is named, without those blocked."""

    def __init__(self, allowed: Iterable[str] = (), blocked: Iterable[str] = ()) -> None:
        """Args: allowed, blocked: peer ids."""
        self._allowed = frozenset(allowed)
        self._blocked = frozenset(blocked)

    def admit(self, peer_id: str) -> bool:
        """Whether a peer is dealt with."""
        return not self.block(peer_id) and (not self._allowed or peer_id in self._allowed)

    def block(self, peer_id: str) -> bool:
        """Whether a peer is named as one that is not dealt with."""
        return peer_id in self._blocked

    @property
    def admit_all(self) -> bool:
        """Whether there is nothing to check."""
        return not self._allowed and not self._blocked


class TableLists:
    """Whom a peer serves at all, and with whom it shares its part of the table: one part for all servers and
    clients of the peer.

    A server is to be found by clients that it admits, wherever these look, and finds others with the help of
    any peer. So a list of allowed peers says who may use the peer's own part of the table, and a list of
    blocked ones is for both ways. What one server or client admits, the others bear with.
    """

    def __init__(self, own_id: str, joined: Iterable[str] = ()) -> None:
        """Args: joined: the peers that this one was told to join, which it admits unless they are blocked."""
        self._always = frozenset((own_id,))
        self._joined = frozenset(joined)
        self._lists: list[PeerLists] = []

    @contextmanager
    def of_part(self, lists: PeerLists) -> Iterator[None]:
        """Inside the `with` block, a server or a client of this peer has these lists."""
        self._lists.append(lists)
        try:
            yield
        finally:
            self._lists.remove(lists)

    def block(self, peer_id: str) -> bool:
        """Whether a peer is asked nothing, is answered nothing, and none of its records are believed."""
        if not self._lists or peer_id in self._always:
            return False
        return all(lists.block(peer_id) for lists in self._lists)

    def admit(self, peer_id: str) -> bool:
        """Whether a peer's requests are answered, and its streams are served."""
        if not self._lists or peer_id in self._always:
            return True
        named = peer_id in self._joined and not self.block(peer_id)
        return named or any(lists.admit(peer_id) for lists in self._lists)
