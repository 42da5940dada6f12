"""Questions to servers that need no session: what they are doing, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from swarmkit.errors import PeerError, ProtocolError, RemoteError
from swarmkit.net.protocol.messages import (
    SESSION_ENDPOINT,
    Fault,
    GetInfo,
    GetResources,
    Resources,
    ServerInfo,
)
from swarmkit.net.registry.records import Announcement
from swarmkit.net.rpc.conversation import Conversation
from swarmkit.net.transport.seam import Transport, endpoint_of

_ANSWER_TYPES: dict[type, type] = {GetInfo: ServerInfo, GetResources: Resources}
_ASKED_AT_A_TIME = 16


async def ask(
    transport: Transport,
    peer_id: str,
    addresses: Sequence[str],
    question: GetInfo | GetResources,
    timeout: float,
    service: int = 0,
) -> ServerInfo | Resources:
    """One server's answer.

    Args: service: the number of the server at its peer.

    Raises:
        PeerError: it cannot be reached in time, or does not answer as it should.
        TimeoutError: it was reached, and said nothing.
    """
    stream = await transport.open(peer_id, endpoint_of(SESSION_ENDPOINT, service), addresses, timeout)
    try:
        conversation = Conversation(stream, 0, timeout)
        with anyio.fail_after(timeout):
            await conversation.send(question)
            reply = (await conversation.receive()).message
    finally:
        stream.close()
    if isinstance(reply, Fault):
        raise RemoteError(reply.message, peer_id, reply.code, reply.retry_after_s)
    if not isinstance(reply, ServerInfo | Resources) or type(reply) is not _ANSWER_TYPES[type(question)]:
        raise ProtocolError(f"asked for {type(question).__name__}, got {type(reply).__name__}", peer_id)
    return reply


async def ask_all(
    transport: Transport, servers: Sequence[Announcement], timeout: float
) -> dict[str, ServerInfo]:
    """What servers are doing, by service id; those that do not answer in time are left out."""
    found: dict[str, ServerInfo] = {}
    turns = anyio.Semaphore(_ASKED_AT_A_TIME)

    async def one(server: Announcement) -> None:
        async with turns:
            try:
                reply = await ask(
                    transport, server.peer_id, server.addresses, GetInfo(), timeout, server.service
                )
            except (PeerError, TimeoutError):
                return
            assert isinstance(reply, ServerInfo)
            found[server.service_id] = reply

    async with anyio.create_task_group() as tasks:
        for server in servers:
            tasks.start_soon(one, server)
    return found
