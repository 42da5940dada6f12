"""Fair shares of what a peer has of anything (places, bytes): decisions only, over plain data.

One peer may hold all that nobody else needs. When another one needs some of it, both have a share: hosts
(the addresses that peers come from) share equally, and so do the peers of one host. A peer that holds more
than its share gives way to one that would still be within its own::

    capacity 12      host a: peer 1 holds 12                     host a: peer 1 holds 6
                     host b: peer 2 asks for 3        ──>        host b: peer 2 holds 3
                                                                         3 are free
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

_HOST_BITS_V6 = 64


class Holder(NamedTuple):
    """A peer, and the host that it comes from; no host where that is not known."""

    host: str
    peer: str


NOBODY = Holder("", "")
"""Stands for a peer that is not known."""


def host_of(address: str) -> str:
    """Return the host that an IP address stands for; empty if it is no IP address.

    Of an IPv6 address that is its network of 64 bits (RFC 4291, section 2.5.1), in which one machine may have
    as many addresses as it likes.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, _HOST_BITS_V6), strict=False))
    return str(ip)


def gives_way(held: Mapping[Holder, float], asking: Holder, needed: float, capacity: float) -> Holder | None:
    """Return whose holding is to shrink so that another peer can have `needed`; None: nobody's is.

    Args:
        held: what each peer holds. More than the capacity may be held.
        asking: needs more than is free.
    """
    hosts: dict[str, float] = {asking.host: 0.0}
    for holder, amount in held.items():
        hosts[holder.host] = hosts.get(holder.host, 0.0) + amount
    host = _beyond(hosts, asking.host, needed, capacity)
    if host is None:  # no other host; perhaps another peer of the same one
        host, capacity = asking.host, max(capacity / len(hosts), hosts[asking.host])
        peers = {holder.peer: amount for holder, amount in held.items() if holder.host == host}
        peer = _beyond({asking.peer: 0.0, **peers}, asking.peer, needed, capacity)
    else:
        peers = {holder.peer: amount for holder, amount in held.items() if holder.host == host}
        peer = max(peers, key=lambda one: (peers[one], one))
    return None if peer is None else Holder(host, peer)


def _beyond(held: Mapping[str, float], asking: str, needed: float, capacity: float) -> str | None:
    """Who holds most, and more than its share, while the one that asks stays within its own."""
    share = capacity / len(held)
    if held[asking] + needed > share:
        return None
    most = max(held, key=lambda one: (held[one], one))
    return most if most != asking and held[most] > share else None


class HeldPlaces(Generic[T]):
    """What is in the places of a service, by the peers that hold it, in order of arrival.

    Who gives way is found as soon however much one peer holds: else somebody who has all places and asks for
    more, again and again, would have all of it counted each time.
    """

    def __init__(self) -> None:
        self._holders: dict[T, Holder] = {}
        self._of: dict[Holder, dict[T, None]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, thing: T, holder: Holder) -> None:
        """Let a peer hold one more place."""
        self._holders[thing] = holder
        self._of.setdefault(holder, {})[thing] = None

    def remove(self, thing: T) -> None:
        """Give a place back. May be called twice."""
        if (holder := self._holders.pop(thing, None)) is not None:
            of_holder = self._of[holder]
            del of_holder[thing]
            if not of_holder:
                del self._of[holder]

    def gives_way(self, asking: Holder, capacity: int) -> Holder | None:
        """Whose holding is to shrink so that another peer can have one place; see `gives_way`."""
        return gives_way({holder: float(len(of)) for holder, of in self._of.items()}, asking, 1, capacity)

    def first(self, holder: Holder) -> T | None:
        """What came first of all that a peer holds."""
        return next(iter(self._of.get(holder, ())), None)

    def last(self, holder: Holder) -> T | None:
        """What came last of it."""
        return next(reversed(self._of.get(holder, {})), None)
