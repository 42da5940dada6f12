"""Requests to servers that need no session: what they are doing, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import (
    NotAdmittedError,
    NotServedError,
    PeerError,
    PeerTimeoutError,
    PeerUnreachableError,
)
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
    versions: tuple[int, int] | None = None,
) -> ServerInfo | Resources:
    """Ask one server, and return its answer.

    Args:
        service: the number of the server at its peer.
        versions: the protocol versions that it says it speaks.

    Raises:
        PeerError: it cannot be reached, or does not answer in time and as it should.
    """
    answer, _ = await _ask_in_time(
        transport, peer_id, addresses, question, timeout, service, SYSTEM_CLOCK, versions
    )
    return answer


async def _ask_in_time(
    transport: Transport,
    peer_id: str,
    addresses: Sequence[str],
    question: GetInfo | GetResources,
    timeout: float,
    service: int,
    clock: Clock,
    versions: tuple[int, int] | None,
) -> tuple[ServerInfo | Resources, float]:
    """The answer, and how many seconds it took once there was a stream."""
    stream = await connect(
        transport, SESSION, peer_id, addresses, timeout, service=service, versions=versions
    )
    try:
        with stream.within(timeout):
            asked = clock.now()
            return await stream.ask(question, _ANSWER_TYPES[type(question)]), clock.now() - asked
    finally:
        stream.close()


@dataclass(frozen=True)
class InfoAnswer:
    """What a server is doing, and the seconds from the question to its answer."""

    info: ServerInfo
    round_trip_s: float


async def is_there(transport: Transport, server: Announcement, timeout: float) -> bool:
    """Whether a server's peer answers within `timeout` seconds, be it with a refusal."""
    try:
        await ask(
            transport, server.peer_id, server.addresses, GetInfo(), timeout, server.service, server.protocols
        )
    except (NotServedError, NotAdmittedError):
        return True
    except (PeerUnreachableError, PeerTimeoutError):
        return False
    except PeerError:
        return True
    return True


async def ask_all(
    transport: Transport, servers: Sequence[Announcement], timeout: float, clock: Clock = SYSTEM_CLOCK
) -> dict[str, InfoAnswer]:
    """What servers are doing, by service id; servers that do not answer in time are left out."""
    found: dict[str, InfoAnswer] = {}
    turns = anyio.Semaphore(_ASKED_AT_A_TIME)

    async def one(server: Announcement) -> None:
        async with turns:
            try:
                reply, seconds = await _ask_in_time(
                    transport,
                    server.peer_id,
                    server.addresses,
                    GetInfo(),
                    timeout,
                    server.service,
                    clock,
                    server.protocols,
                )
            except PeerError:
                return
            assert isinstance(reply, ServerInfo)
            found[server.service_id] = InfoAnswer(reply, seconds)

    async with anyio.create_task_group() as tasks:
        for server in servers:
            tasks.start_soon(one, server)
    return found
