"""Requests to servers that need no session: what they are doing, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from swarmkit.errors import PeerError
from swarmkit.net.protocol.messages import (
    SESSION,
    GetInfo,
    GetResources,
    Resources,
    ServerInfo,
)
from swarmkit.net.registry.records import Announcement
from swarmkit.net.rpc.endpoints import connect
from swarmkit.net.transport.seam import Transport

_ANSWER_TYPES: dict[type, type[ServerInfo] | type[Resources]] = {GetInfo: ServerInfo, GetResources: Resources}
_ASKED_AT_A_TIME = 16


async def ask(
    transport: Transport,
    peer_id: str,
    addresses: Sequence[str],
    question: GetInfo | GetResources,
    timeout: float,
    service: int = 0,
) -> ServerInfo | Resources:
    """Ask one server, and return its answer.

    Args: service: the number of the server at its peer.

    Raises:
        PeerError: it cannot be reached, or does not answer in time and as it should.
    """
    stream = await connect(transport, SESSION, peer_id, addresses, timeout, service=service)
    try:
        with stream.within(timeout):
            return await stream.ask(question, _ANSWER_TYPES[type(question)])
    finally:
        stream.close()


async def ask_all(
    transport: Transport, servers: Sequence[Announcement], timeout: float
) -> dict[str, ServerInfo]:
    """What servers are doing, by service id; servers that do not answer in time are left out."""
    found: dict[str, ServerInfo] = {}
    turns = anyio.Semaphore(_ASKED_AT_A_TIME)

    async def one(server: Announcement) -> None:
        async with turns:
            try:
                reply = await ask(
                    transport, server.peer_id, server.addresses, GetInfo(), timeout, server.service
                )
            except PeerError:
                return
            assert isinstance(reply, ServerInfo)
            found[server.service_id] = reply

    async with anyio.create_task_group() as tasks:
        for server in servers:
            tasks.start_soon(one, server)
    return found
