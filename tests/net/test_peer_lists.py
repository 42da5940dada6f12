"""What passes between a peer and those that its owner's lists exclude: streams, and requests to the table."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from swarmkit.errors import NoContactError, NotAdmittedError, RemoteError, TransportError
from swarmkit.net.hivemind.gate import TableGate
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.protocol.messages import SESSION, GetInfo, ServerInfo
from swarmkit.net.rpc.endpoints import connect, listen
from swarmkit.net.rpc.listed_transport import ListedTransport
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.peer_lists import PeerLists, TableLists
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


# the shared table


OWN, JOINED, A, B = "own", "joined", "a", "b"


@pytest.mark.parametrize(
    ("parts", "peer", "admitted", "blocked"),
    [
        ([], A, True, False),
        ([PeerLists()], A, True, False),
        ([PeerLists(allowed=[A])], A, True, False),
        ([PeerLists(allowed=[A])], B, False, False),
        ([PeerLists(allowed=[A])], JOINED, True, False),
        ([PeerLists(allowed=[A])], OWN, True, False),
        ([PeerLists(blocked=[A])], A, False, True),
        ([PeerLists(blocked=[A])], B, True, False),
        ([PeerLists(blocked=[JOINED])], JOINED, False, True),
        ([PeerLists(blocked=[OWN])], OWN, True, False),
        ([PeerLists(allowed=[A], blocked=[A])], A, False, True),
        ([PeerLists(blocked=[A]), PeerLists()], A, True, False),  # one table for both
        ([PeerLists(allowed=[A]), PeerLists(allowed=[B])], B, True, False),
        ([PeerLists(blocked=[A]), PeerLists(allowed=[B])], A, False, False),
    ],
)
async def test_the_table_is_shared_by_the_lists_of_all_parts(
    parts: list[PeerLists], peer: str, admitted: bool, blocked: bool
) -> None:
    lists = TableLists(OWN, [JOINED])
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(lists.of_part(part))
        assert (lists.admit(peer), lists.block(peer)) == (admitted, blocked)
    assert lists.admit(peer)


async def answered(keeper: TableLists, asker: TableLists) -> bool:
    """Whether a request to the table is answered."""

    async def answer(request: Any, context: Any) -> str:
        return "answer"

    gated = TableGate(None, keeper).answering("rpc_find", answer)
    context = SimpleNamespace(remote_id="asker", local_id="keeper")
    ask = TableGate(None, asker).asking("rpc_find", lambda one: gated(one, context), "asker", "keeper")
    try:
        return await ask(None) == "answer"
    except NotAdmittedError:
        return False


@pytest.mark.parametrize(
    ("keeper", "asker", "is_answered"),
    [
        (PeerLists(), PeerLists(), True),
        (PeerLists(allowed=["asker"]), PeerLists(blocked=["another"]), True),
        (PeerLists(blocked=["asker"]), PeerLists(), False),
        (PeerLists(allowed=["another"]), PeerLists(), False),
        (PeerLists(), PeerLists(blocked=["keeper"]), False),
        (PeerLists(), PeerLists(allowed=["another"]), True),
    ],
)
async def test_a_request_to_the_table_passes_the_lists_of_both_ends(
    keeper: PeerLists, asker: PeerLists, is_answered: bool
) -> None:
    kept, asked = TableLists("keeper"), TableLists("asker")
    with kept.of_part(keeper), asked.of_part(asker):
        assert await answered(kept, asked) is is_answered


async def test_records_of_a_peer_that_is_not_allowed_are_found_all_the_same(
    peers: tuple[Transport, Transport],
) -> None:
    server, client = peers
    await server.store([("of another", b"1")], time.time() + 60)
    with client.deal_with(PeerLists(allowed=["a friend"])):
        assert await client.fetch(["of another"]) == {"of another": {server.peer_id: b"1"}}


async def test_no_record_of_a_blocked_peer_is_believed(peers: tuple[Transport, Transport]) -> None:
    server, client = peers
    await server.store([("of a server", b"1")], time.time() + 60)
    assert await client.fetch(["of a server"]) == {"of a server": {server.peer_id: b"1"}}
    with client.deal_with(PeerLists(blocked=[server.peer_id])), contextlib.suppress(NoContactError):
        assert await client.fetch(["of a server"]) == {}


@pytest.mark.parametrize("name", ["allowed", "blocked"])
async def test_a_peer_that_is_excluded_cannot_join(name: str) -> None:
    keeper = await HivemindTransport.create()
    stranger = Identity()
    lists = PeerLists(**{name: ["another" if name == "allowed" else stranger.peer_id]})
    try:
        with keeper.deal_with(lists), pytest.raises(TransportError, match="does not admit this peer"):
            await HivemindTransport.create(initial_peers=keeper.addresses, identity=stranger)
    finally:
        await keeper.close()


async def test_a_peer_that_was_excluded_later_stores_nothing_and_finds_nothing() -> None:
    keeper = await HivemindTransport.create()
    stranger = await HivemindTransport.create(initial_peers=keeper.addresses, client_mode=True)
    try:
        await keeper.store([("kept", b"1")], time.time() + 60)
        with keeper.deal_with(PeerLists(blocked=[stranger.peer_id])):
            stored = await stranger.store([("foreign", b"1")], time.time() + 60)
            with contextlib.suppress(NoContactError):
                assert await stranger.fetch(["kept"]) == {}
        assert (stored, await keeper.fetch(["foreign"])) == (0, {})
    finally:
        await stranger.close()
        await keeper.close()
