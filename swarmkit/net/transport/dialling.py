"""Which announced addresses a peer dials at another peer's word, so that it never probes its own network."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

_NOT_RESOLVED = ("dns", "dns4", "dns6", "dnsaddr")
"""A name may stand for any address, so that it is not dialled at another peer's word."""

_RANGES = [
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "fc00::/7",
        "fe80::/10",
    )
]
"""Ranges of addresses that mean another machine in each network."""


def may_dial(addresses: Iterable[str], own: Sequence[str]) -> tuple[str, ...]:
    """Return those of a peer's announced addresses that a peer with the addresses `own` may dial.

    These are addresses of the Internet, and private ones where this peer has one of the same range, as peers
    in one local network do. Loopback is for swarms on one machine: this peer has a loopback address and none
    of the Internet.
    """
    kinds = {_kind_of(address) for address in own}
    allowed = {"internet", *kinds} - {""}
    if "internet" in kinds:
        allowed.discard("loopback")
    return tuple(address for address in addresses if _kind_of(address) in allowed)


def _kind_of(address: str) -> str:
    """What a multiaddress can be reached from; empty where that cannot be told."""
    parts = address.split("/")
    protocol, host = (parts[1], parts[2]) if len(parts) > 2 else ("", "")
    if protocol not in ("ip4", "ip6"):
        return "" if protocol in _NOT_RESOLVED else protocol
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return "loopback"
    if ip.is_unspecified or ip.is_multicast:
        return ""
    for network in _RANGES:
        if ip in network:
            return str(network)
    return "internet" if ip.is_global else ""
