"""Opens a client's session at one server, with the adapter of the server's blocks."""

from __future__ import annotations

import anyio.to_thread

from swarmkit.client.adapters.model_adapters import ClientAdapter, ServerAdapter
from swarmkit.client.routing.route import Hop
from swarmkit.client.session.stage_connection import StageConnection
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import ProtocolError, RemoteError
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.net.protocol.messages import SESSION, Open, Opened


async def open_session(
    swarm: SwarmClient,
    hop: Hop,
    adapter: ClientAdapter | ServerAdapter | None,
    max_length: int,
) -> tuple[StageConnection, Opened]:
    """Open a session of up to `max_length` tokens; sends what the server lacks of a client's own adapter.

    Returns: the stream that carries the session, and what the server said of it.

    Raises:
        PeerError: the server cannot be reached, or refuses.
    """
    connection = StageConnection(await swarm.connect(hop.server, SESSION))
    try:
        connection.opened = await _opened(connection, swarm, hop, adapter, max_length)
    except BaseException:
        connection.close()
        raise
    return connection, connection.opened


async def _opened(
    connection: StageConnection,
    swarm: SwarmClient,
    hop: Hop,
    adapter: ClientAdapter | ServerAdapter | None,
    max_length: int,
) -> Opened:
    name, part = ("", None) if adapter is None else await _part_of(adapter, hop)
    message = Open(swarm.model.fingerprint, hop.start, hop.stop, max_length, name)
    asked_at = swarm.clock.now()
    # To open a session computes nothing: a silent server would be found out later, and more slowly.
    try:
        reply = await connection.ask(message, swarm.connect_timeout)
    except RemoteError as error:
        if error.code != "no_adapter" or part is None:
            raise
        swarm.adapters.forget(hop.server, name)
        await swarm.adapters.ensure(hop.server, part)
        reply = await connection.ask(message, swarm.connect_timeout)
    if not isinstance(reply, Opened) or reply.max_step_tokens < 1:
        raise ProtocolError("the session was not opened as asked", hop.server.peer_id)
    times = swarm.routes.times_of(hop.server)
    times.blocks, times.way_s = hop.stop - hop.start, swarm.clock.now() - asked_at
    return reply


async def _part_of(adapter: ClientAdapter | ServerAdapter, hop: Hop) -> tuple[str, Adapter | None]:
    """What the server's blocks get of an adapter, and its name there, for which a hash is computed."""
    part = adapter.part(hop.start, hop.stop)
    if part is None:
        return adapter.hosted_name, None
    return await anyio.to_thread.run_sync(lambda: part.digest), part
