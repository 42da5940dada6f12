"""Streams between a peer and those that its owner's lists exclude."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from swarmkit.errors import NotAdmittedError, RemoteError
from swarmkit.net.protocol.messages import SESSION, GetInfo, ServerInfo
from swarmkit.net.rpc.endpoints import connect, listen
from swarmkit.net.rpc.peer_lists import ListedTransport, PeerLists
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.transport.seam import Stream, Transport

from .worlds import WORLDS

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]


@pytest.mark.parametrize(
    ("allowed", "blocked", "admitted"),
    [
        ((), (), True),
        (("a",), (), True),
        (("b",), (), False),
        ((), ("a",), False),
        ((), ("b",), True),
        (("a",), ("a",), False),
    ],
)
async def test_a_peer_is_admitted_by_the_lists(
    allowed: tuple[str, ...], blocked: tuple[str, ...], admitted: bool
) -> None:
    assert PeerLists(allowed, blocked).admit("a") is admitted


@pytest_asyncio.fixture(params=sorted(WORLDS), scope="module", loop_scope="module")
async def peers(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Transport, Transport]]:
    """A server and a client."""
    world = WORLDS[request.param]()
    yield await world.peer(), await world.peer()
    await world.close()


async def answer_anything(stream: Stream) -> None:
    """Answer each message with a fault of another code than the lists have."""
    served = ServerStream(stream, SESSION, max_payload_bytes=0, message_timeout=10.0)

    async def fail(_: Any) -> None:
        raise ValueError("served")

    await served.serve(fail)


async def code_of_answer(server: Transport, client: Transport, lists: PeerLists) -> str:
    await listen(ListedTransport(server, lists), SESSION, answer_anything)
    stream = await connect(client, SESSION, server.peer_id, server.addresses)
    try:
        with stream.within(30.0):
            await stream.ask(GetInfo(), ServerInfo)
        return ""
    except RemoteError as error:
        return error.code
    finally:
        stream.close()


async def test_a_blocked_peer_is_told_that_it_is_not_admitted(peers: tuple[Transport, Transport]) -> None:
    server, client = peers
    assert await code_of_answer(server, client, PeerLists(blocked=[client.peer_id])) == "not_admitted"


async def test_a_peer_that_is_not_allowed_is_told_so(peers: tuple[Transport, Transport]) -> None:
    server, client = peers
    assert await code_of_answer(server, client, PeerLists(allowed=["another"])) == "not_admitted"


async def test_an_allowed_peer_is_served(peers: tuple[Transport, Transport]) -> None:
    server, client = peers
    assert await code_of_answer(server, client, PeerLists(allowed=[client.peer_id])) == "internal"


async def test_a_peer_may_always_be_its_own_client(peers: tuple[Transport, Transport]) -> None:
    server, _ = peers
    assert await code_of_answer(server, server, PeerLists(allowed=["another"])) == "internal"


async def test_no_stream_is_opened_to_an_excluded_peer(peers: tuple[Transport, Transport]) -> None:
    server, client = peers
    with pytest.raises(NotAdmittedError, match="lists exclude"):
        await ListedTransport(client, PeerLists(blocked=[server.peer_id])).open(server.peer_id, "any")
