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
from typing import NamedTuple

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
