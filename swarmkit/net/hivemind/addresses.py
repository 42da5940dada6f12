"""Multiaddresses of peers: which are well-formed, and what stands in them."""

from __future__ import annotations

import importlib
import ipaddress
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import base58

from swarmkit.net.transport.shares import host_of

logger = logging.getLogger(__name__)

_P2P = bytes([0xA5, 0x03])
"""421, the code of `p2p` in a multiaddress, as a varint."""
_LIBP2P_KEY = bytes([0x01, 0x72])
"""How the CID of a peer id begins: version 1, libp2p-key."""
_LOCAL_HOSTS = ("127.", "::1", "localhost")


def dialable(peer_id: str, addresses: Sequence[str]) -> list[bytes]:
    """The addresses that are well-formed and this peer's, as the daemon wants them."""
    suffix = f"/p2p/{peer_id}"
    found = []
    for address in addresses:
        head, _, tail = address.rpartition("/p2p/")
        if head and "/" not in tail:
            if not address.endswith(suffix):
                continue  # another peer's
            address = head
        if address.strip("/") and (parsed := multiaddr(address)) is not None:
            found.append(_encoded(address, bytes(parsed.to_bytes())))
    return found


def _encoded(address: str, data: bytes) -> bytes:
    """A multiaddress as the daemon reads it: with plain multihashes for peer ids, such as that of a relay.

    hivemind's class writes ids as CIDs, which the daemon takes for addresses that are cut off.
    """
    parts = address.split("/")
    for name, value in itertools.pairwise(parts):
        if name == "p2p":
            raw = base58.b58decode(value)
            cid = _LIBP2P_KEY + raw
            data = data.replace(_P2P + bytes([len(cid)]) + cid, _P2P + bytes([len(raw)]) + raw)
    return data


def ip_of(address: str) -> str | None:
    """The IP address in a multiaddress that is dialled over TCP without a relay; None for other kinds."""
    parts = address.split("/")
    plain = (
        len(parts) >= 5 and parts[1] in ("ip4", "ip6") and parts[3] == "tcp" and "p2p-circuit" not in parts
    )
    if not plain:
        return None
    try:
        return str(ipaddress.ip_address(parts[2]))
    except ValueError:
        return None


def host_in(raw: bytes) -> str:
    """The host of a multiaddress in the daemon's form, from which a peer came; empty if there is none."""
    try:
        return host_of(ip_of(str(multiaddr_type()(raw))) or "")
    except Exception as error:  # noqa: BLE001 - its parser raises many kinds
        logger.debug("not a multiaddress: %r (%r)", raw, error)
        return ""


def tcp_port_of(address: str) -> int | None:
    """The port in a multiaddress that is dialled over TCP without a relay."""
    parts = address.split("/")
    return int(parts[4]) if ip_of(address) and parts[4].isdigit() else None


def is_local(address: str) -> bool:
    """Whether a multiaddress is of this machine only."""
    return any(address.split("/")[2:3] and address.split("/")[2].startswith(host) for host in _LOCAL_HOSTS)


def multiaddr(address: str) -> Any:
    """The parsed address, or None: addresses come from foreign peers."""
    try:
        return multiaddr_type()(address)
    except Exception as error:  # noqa: BLE001 - its parser raises many kinds
        logger.debug("not a multiaddress: %r (%r)", address, error)
        return None


def multiaddr_type() -> Any:
    """hivemind's class for multiaddresses."""
    return importlib.import_module("hivemind.utils.multiaddr").Multiaddr
