"""How a program gets its transport: from a factory, so that tests hand in a network of their own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import anyio

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import UsageError
from swarmkit.net.registry.acceptance import is_acceptable
from swarmkit.net.registry.member_transport import MemberTransport
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.listed_transport import AdmittingTransport
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.invite import joined_links
from swarmkit.net.transport.seam import RecordCheck, Transport
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.settings import NetSettings

TransportFactory: TypeAlias = Callable[[Identity, RecordCheck], Awaitable[Transport]]
"""Make and start a transport for an identity; it keeps only records that the check accepts."""


@asynccontextmanager
async def joined(
    factory: TransportFactory, identity: Identity, clock: Clock = SYSTEM_CLOCK
) -> AsyncIterator[tuple[Transport, Registry]]:
    """A transport and its registry, as a peer of the swarm until the block is left."""
    transport = await factory(
        identity,
        lambda key, subkey, value, expires_at: is_acceptable(key, subkey, value, expires_at, clock.time()),
    )
    try:
        yield AdmittingTransport(transport), Registry(transport, lambda: clock.time())
    finally:
        with anyio.CancelScope(shield=True):
            await transport.close()


def over_hivemind(
    initial_peers: Sequence[str] = (),
    *,
    settings: NetSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    announce: Sequence[str] = (),
    client_mode: bool = False,
    use_relay: bool = False,
    is_reachable: bool = False,
    swarm_key: SwarmKey | str | os.PathLike[str] | None = None,
    lan: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> HivemindFactory:
    """Transports that join the swarm of `initial_peers` (or start one) through hivemind's p2p daemon.

    Args:
        initial_peers: addresses, or links that `swarmkit invite` made; a link of a private swarm brings its
            key along. The word `lan` stands for the peers that are advertised in the local network.
        host, port: where to listen; port 0 lets the system choose.
        announce: addresses that others shall dial instead of the ones listened on.
        client_mode: use the swarm without keeping records for it.
        use_relay: be reachable through the initial peers, since this one is behind a NAT.
        is_reachable: pass connections on to such peers, since this one can be reached from outside. Of a peer
            that says neither, the settings do.
        swarm_key: the key of a private swarm, or its file; the settings' file if not given.
        lan: advertise this peer in the local network.

    Raises:
        UsageError: the key's file cannot be read, or a link is damaged or has expired.
    """
    limits = settings or NetSettings()
    if isinstance(initial_peers, str):  # one address, not a list of letters
        initial_peers = [initial_peers]
    addresses, from_link = joined_links(initial_peers, clock.time())
    key = swarm_key_of(swarm_key or (None if from_link else limits.swarm_key_file))
    if key is not None and from_link is not None and key.swarm != from_link.swarm:
        raise UsageError("the swarm key is not of the swarm that the invite link is of; give one of the two")
    key = key or from_link
    swarm = key.swarm.hex() if key is not None else ""

    async def create(identity: Identity, record_check: RecordCheck) -> Transport:
        from swarmkit.net.hivemind.transport import HivemindTransport

        transport: Transport = await HivemindTransport.create(
            initial_peers=await in_lan(addresses, swarm),
            identity=identity,
            host=host,
            port=port,
            announce_maddrs=announce,
            client_mode=client_mode,
            use_auto_relay=use_relay,
            reachability="private" if use_relay else "public" if is_reachable else limits.reachability,
            startup_timeout=limits.startup_timeout_s,
            keep_alive_s=limits.keep_alive_s,
            record_check=record_check,
            swarm_key=key,
            clock=clock,
        )
        if lan:
            from swarmkit.net.lan import LanTransport

            transport = await LanTransport.advertise(transport, swarm)
        return as_member(transport, key, clock)

    return HivemindFactory(create, key.identity if key is not None else None)


class HivemindFactory:
    """Starts transports over hivemind; see `over_hivemind`.

    Attributes:
        identity: the one that came with the swarm's key or link, which the peer has unless another is given.
    """

    def __init__(self, create: TransportFactory, identity: Identity | None = None) -> None:
        self._create = create
        self.identity = identity

    async def __call__(self, identity: Identity, record_check: RecordCheck) -> Transport:
        return await self._create(identity, record_check)


async def in_lan(addresses: Sequence[str], swarm: str = "") -> Sequence[str]:
    """Addresses, where those of the local network's peers stand for `lan`; see `lan.resolved`."""
    if not any(address.lower() in ("lan", "local") for address in addresses):
        return addresses
    from swarmkit.net.lan import resolved

    return await resolved(addresses, swarm)


def identity_for(factory: TransportFactory, path: str | os.PathLike[str] | None = None) -> Identity:
    """The identity of a peer: that of a file, else the one that came with its key, else a new one.

    Raises:
        UsageError: the file cannot be read or written, or holds something else.
    """
    if path is not None:
        return Identity.load_or_create(Path(path))
    found: Identity | None = getattr(factory, "identity", None)
    return found or Identity()


def as_member(transport: Transport, key: SwarmKey | None, clock: Clock = SYSTEM_CLOCK) -> Transport:
    """The transport of a peer, which follows what the owner of its swarm takes back, if it has one."""
    return transport if key is None or key.members is None else MemberTransport(transport, key.members, clock)


def swarm_key_of(given: SwarmKey | str | os.PathLike[str] | None) -> SwarmKey | None:
    """The key that a caller has given, as itself or as its file.

    Raises:
        UsageError: the file cannot be read.
    """
    return SwarmKey.load(given) if isinstance(given, str | os.PathLike) else given
