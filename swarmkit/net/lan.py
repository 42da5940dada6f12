"""Peers of a local network that find each other by mDNS (RFC 6762 and 6763), without any other peer's help.

A peer that was asked to says by multicast where it listens, and of which private swarm it is, by an id that
tells nothing else; nothing is said of models. Whoever joins by `lan` trusts the local network as it would
trust an address that somebody told it: anybody there can answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Sequence
from typing import Any

import anyio
from zeroconf import Error as ZeroconfError
from zeroconf import InterfaceChoice, IPVersion, ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from swarmkit.errors import TransportError
from swarmkit.net.transport.identity import is_peer_id
from swarmkit.net.transport.part import PartTransport
from swarmkit.net.transport.seam import Transport

logger = logging.getLogger(__name__)

SERVICE = "_swarmkit._tcp.local."
WORDS = ("lan", "local")
"""What stands for the peers of the local network, in the place of an address."""

_PATIENCE_S = 4.0
_GRACE_S = 0.5
"""After the first answer others are waited for so long."""
_ANSWER_TIMEOUT_MS = 2000
_MOST_PEERS = 16

Interfaces = Sequence[str] | InterfaceChoice
_ALL = InterfaceChoice.All


class LanTransport(PartTransport):
    """A peer's transport that is advertised in the local network until it is closed."""

    def __init__(self, transport: Transport, zeroconf: AsyncZeroconf) -> None:
        super().__init__(transport)
        self._zeroconf = zeroconf

    @classmethod
    async def advertise(
        cls, transport: Transport, swarm: str = "", interfaces: Interfaces = _ALL
    ) -> Transport:
        """Say in the local network where a peer listens.

        Args:
            swarm: the id of its private swarm; empty for an open one.
            interfaces: the addresses of the network interfaces to use.

        Returns: the transport, or what takes its place.
        """
        places = places_in(transport.addresses)
        if not places:
            logger.warning("this peer listens at no address of a local network, so that it is not advertised")
            return transport
        port = places[0][1]
        info = AsyncServiceInfo(
            SERVICE,
            f"{transport.peer_id}.{SERVICE}",
            addresses=[host.packed for host, its_port in places if its_port == port],
            port=port,
            properties={"swarm": swarm},
            server=f"{transport.peer_id[-12:]}.local.",
        )
        zeroconf = AsyncZeroconf(interfaces=interfaces, ip_version=_version_for(places))
        try:
            await zeroconf.async_register_service(info)
        except (ZeroconfError, OSError) as error:
            await zeroconf.async_close()
            logger.warning("this peer is not advertised in the local network: %r", error)
            return transport
        except BaseException:
            await zeroconf.async_close()
            raise
        return cls(transport, zeroconf)

    async def close(self) -> None:
        await self._zeroconf.async_unregister_all_services()
        await self._zeroconf.async_close()
        await super().close()


async def resolved(
    given: Sequence[str], swarm: str = "", interfaces: Interfaces = _ALL, patience_s: float = _PATIENCE_S
) -> list[str]:
    """Addresses, where those of the local network's peers stand for `lan` or `local`; see `find`.

    Raises:
        TransportError: it was asked for, and no peer of the swarm answers there.
    """
    addresses = [address for address in given if address.lower() not in WORDS]
    if len(addresses) == len(given):
        return addresses
    found = await find(swarm, interfaces, patience_s)
    if not found and not addresses:
        kind = "this private swarm" if swarm else "an open swarm"
        raise TransportError(
            f"no peer of {kind} answers in the local network. Start one there with --lan and --host 0.0.0.0, "
            "or join by an address or an invite link; some networks let no multicast pass (UDP port 5353)"
        )
    return [*addresses, *found]


async def find(swarm: str = "", interfaces: Interfaces = _ALL, patience_s: float = _PATIENCE_S) -> list[str]:
    """The addresses of a swarm's peers that are advertised in the local network.

    Args:
        swarm: the id of a private swarm; empty for open ones.
        patience_s: how long to wait for the first answer.
    """
    found: dict[str, list[str]] = {}
    names: asyncio.Queue[str] = asyncio.Queue(_MOST_PEERS)

    def note(zeroconf: Any, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Added and not names.full():
            names.put_nowait(name)

    try:
        zeroconf = AsyncZeroconf(interfaces=interfaces)
    except OSError as error:
        logger.warning("the local network cannot be searched: %s", error)
        return []
    grace: asyncio.TimerHandle | None = None
    browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[note])
    try:
        with anyio.move_on_after(patience_s) as waiting:
            while len(found) < _MOST_PEERS:
                info = AsyncServiceInfo(SERVICE, await names.get())
                if await info.async_request(zeroconf.zeroconf, _ANSWER_TIMEOUT_MS):
                    peer_id, addresses = read_advertisement(info, swarm)
                    if addresses:
                        if grace is None:
                            grace = asyncio.get_running_loop().call_later(_GRACE_S, waiting.cancel)
                        found[peer_id] = addresses
    finally:
        if grace is not None:
            grace.cancel()
        await browser.async_cancel()
        await zeroconf.async_close()
    return [address for addresses in found.values() for address in addresses]


def read_advertisement(info: AsyncServiceInfo, swarm: str) -> tuple[str, list[str]]:
    """The peer id and the addresses in an advertisement; none if it is of another swarm, or malformed."""
    peer_id = info.name.partition(".")[0]
    its_swarm = (info.properties.get(b"swarm") or b"").decode(errors="replace")
    port = info.port or 0
    if not is_peer_id(peer_id) or its_swarm != swarm or not 0 < port < 65536:
        return "", []
    hosts = [ipaddress.ip_address(packed) for packed in info.addresses_by_version(IPVersion.All)]
    return peer_id, [f"/ip{host.version}/{host}/tcp/{port}/p2p/{peer_id}" for host in hosts[:_MOST_PEERS]]


Place = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]
"""Where a peer listens by TCP: host and port."""


def places_in(addresses: Sequence[str]) -> list[Place]:
    """Where a peer listens by TCP; not on loopback, unless it listens nowhere else."""
    places: list[Place] = []
    for address in addresses:
        parts = address.split("/")
        if len(parts) > 4 and parts[1] in ("ip4", "ip6") and parts[3] == "tcp" and "p2p-circuit" not in parts:
            places.append((ipaddress.ip_address(parts[2]), int(parts[4])))
    return [place for place in places if not place[0].is_loopback] or places


def _version_for(places: Sequence[Place]) -> IPVersion:
    return IPVersion.All if any(host.version == 6 for host, _ in places) else IPVersion.V4Only
