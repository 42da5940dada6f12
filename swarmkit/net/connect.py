"""How a program gets its transport: from a factory, so that tests hand in a network of their own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

import anyio

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.net.registry.acceptance import is_acceptable
from swarmkit.net.registry.registry import Registry
from swarmkit.net.transport.identity import Identity
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
        yield transport, Registry(transport, lambda: clock.time())
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
    swarm_key: SwarmKey | str | os.PathLike[str] | None = None,
) -> TransportFactory:
    """Transports that join the swarm of `initial_peers` (or start one) through hivemind's p2p daemon.

    Args:
        host, port: where to listen; port 0 lets the system choose.
        announce: addresses that others shall dial instead of the ones listened on.
        client_mode: use the swarm without keeping records for it.
        use_relay: be reachable through other peers when behind a NAT.
        swarm_key: the key of a private swarm, or its file; the settings' file if not given.

    Raises:
        UsageError: the key's file cannot be read.
    """
    limits = settings or NetSettings()
    key = swarm_key_of(swarm_key or limits.swarm_key_file)
    if isinstance(initial_peers, str):  # one address, not a list of letters
        initial_peers = [initial_peers]

    async def create(identity: Identity, record_check: RecordCheck) -> Transport:
        from swarmkit.net.hivemind.transport import HivemindTransport

        return await HivemindTransport.create(
            initial_peers=initial_peers,
            identity=identity,
            host=host,
            port=port,
            announce_maddrs=announce,
            client_mode=client_mode,
            use_auto_relay=use_relay,
            startup_timeout=limits.startup_timeout_s,
            keep_alive_s=limits.keep_alive_s,
            record_check=record_check,
            swarm_key=key,
        )

    return create


def swarm_key_of(given: SwarmKey | str | os.PathLike[str] | None) -> SwarmKey | None:
    """The key that a caller has given, as itself or as its file.

    Raises:
        UsageError: the file cannot be read.
    """
    return SwarmKey.load(given) if isinstance(given, str | os.PathLike) else given
