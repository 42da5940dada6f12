"""What every body of the transport must do; see the docstring of `swarmkit.net.transport.seam`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from swarmkit.errors import NotServedError, PeerError, PeerUnreachableError, TransportError, UsageError
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.seam import MAX_FRAME_BYTES, Stream, Transport

from .worlds import collector, echo, own_tasks

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(60)]


async def connected(world: Any) -> tuple[Transport, Transport, Stream, Stream]:
    """A client and a server with one open stream: both transports, both ends."""
    server, client = await world.peer(), await world.peer()
    handler, streams = collector()
    await server.listen("talk", handler)
    here = await client.open(server.peer_id, "talk", server.addresses)
    there = await streams.get()
    return client, server, here, there


async def nothing_more(stream: Stream) -> None:
    with pytest.raises(PeerUnreachableError):
        await asyncio.wait_for(stream.receive(), 10)


# frames


async def test_a_frame_arrives_as_it_was_sent(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    await here.send(b"hello")
    assert await there.receive() == b"hello"


async def test_the_parts_of_a_frame_arrive_as_one(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    await here.send(b"head", bytearray(b"body"), memoryview(b"tail"))
    assert await there.receive() == b"headbodytail"


async def test_an_empty_frame_is_a_frame(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    await here.send()
    assert await there.receive() == b""


async def test_frames_arrive_in_order(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    for number in range(200):
        await here.send(number.to_bytes(2, "big") * (number + 1))
    got = [await there.receive() for _ in range(200)]
    assert got == [number.to_bytes(2, "big") * (number + 1) for number in range(200)]


@pytest.mark.parametrize("size", [MAX_FRAME_BYTES, 128 * 1024, 128 * 1024 + 1])
async def test_big_frames_pass_in_both_directions(shared: Any, size: int) -> None:
    server, client = await shared.peer(), await shared.peer()
    await server.listen("echo", echo)
    stream = await client.open(server.peer_id, "echo", server.addresses)
    frame = (bytes(range(256)) * (size // 256 + 1))[:size]
    await stream.send(frame[:5], memoryview(frame)[5:])
    assert await stream.receive() == frame


async def test_a_frame_above_the_limit_is_the_callers_mistake(shared: Any) -> None:
    _, _, here, _ = await connected(shared)
    with pytest.raises(UsageError, match="larger than"):
        await here.send(b"x", bytes(MAX_FRAME_BYTES))


async def test_a_stream_survives_a_refused_frame(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    with pytest.raises(UsageError):
        await here.send(bytes(MAX_FRAME_BYTES + 1))
    await here.send(b"still there")
    assert await there.receive() == b"still there"


async def test_a_sender_that_is_not_read_has_to_wait(shared: Any) -> None:
    _, _, here, _ = await connected(shared)

    async def flood() -> None:
        for _ in range(64):
            await here.send(bytes(1024 * 1024))

    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(flood(), 1.0)


async def test_two_streams_do_not_mix(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()
    await server.listen("echo", echo)
    one = await client.open(server.peer_id, "echo", server.addresses)
    two = await client.open(server.peer_id, "echo", server.addresses)

    async def talk(stream: Stream, word: bytes) -> list[bytes]:
        answers = []
        for _ in range(20):
            await stream.send(word)
            answers.append(await stream.receive())
        return answers

    answers = await asyncio.gather(talk(one, b"one"), talk(two, b"two"))
    assert answers == [[b"one"] * 20, [b"two"] * 20]


async def test_two_tasks_may_not_receive_from_one_stream(shared: Any) -> None:
    _, _, here, _ = await connected(shared)
    first = asyncio.create_task(here.receive())
    await asyncio.sleep(0)
    with pytest.raises(UsageError, match="two tasks"):
        await here.receive()
    first.cancel()


async def test_a_cancelled_receive_loses_no_frame(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(there.receive(), 0.01)
    await here.send(b"late")
    assert await there.receive() == b"late"


# who is who


async def test_a_transport_is_named_by_its_identity(world: Any) -> None:
    identity = Identity()
    peer = await world.peer(identity=identity)
    assert peer.peer_id == identity.peer_id


async def test_addresses_end_with_the_peer_id(shared: Any) -> None:
    peer = await shared.peer()
    assert peer.addresses
    assert all(address.endswith(f"/p2p/{peer.peer_id}") for address in peer.addresses)


async def test_both_ends_know_whom_they_talk_to(shared: Any) -> None:
    client, server, here, there = await connected(shared)
    assert (here.peer_id, there.peer_id) == (server.peer_id, client.peer_id)


async def test_a_peer_may_open_a_stream_to_itself(shared: Any) -> None:
    peer = await shared.peer()
    await peer.listen("echo", echo)
    stream = await peer.open(peer.peer_id, "echo", peer.addresses)
    await stream.send(b"me")
    assert await stream.receive() == b"me"


# opening


async def test_a_name_that_is_not_served_is_unreachable(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()
    with pytest.raises(NotServedError, match="does not serve"):
        await client.open(server.peer_id, "nothing", server.addresses)


async def test_an_unknown_peer_is_unreachable(shared: Any) -> None:
    client = await shared.peer()
    with pytest.raises(PeerError):
        await client.open(Identity().peer_id, "echo", timeout=3.0)


async def test_what_is_no_peer_id_is_unreachable(shared: Any) -> None:
    client = await shared.peer()
    with pytest.raises(PeerUnreachableError):
        await client.open("not a peer id!", "echo")


async def test_a_dead_peer_is_unreachable(world: Any) -> None:
    server, client = await world.peer(), await world.peer()
    await server.listen("echo", echo)
    world.kill(server)
    with pytest.raises(PeerError):
        await client.open(server.peer_id, "echo", server.addresses, timeout=3.0)


async def test_foreign_addresses_that_make_no_sense_are_ignored(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()
    await server.listen("echo", echo)
    nonsense = ["", "/", "nonsense", "/ip4/1.2.3.4/tcp/9/p2p/" + Identity().peer_id, "/p2p/x"]
    stream = await client.open(server.peer_id, "echo", [*nonsense, *server.addresses])
    await stream.send(b"found")
    assert await stream.receive() == b"found"


# ends


async def test_frames_sent_before_a_close_still_arrive(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    await here.send(b"last words")
    here.close()
    assert await there.receive() == b"last words"


async def test_a_close_ends_the_other_sides_receive(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    here.close()
    await nothing_more(there)


async def test_closing_twice_is_fine(shared: Any) -> None:
    _, _, here, _ = await connected(shared)
    here.close()
    here.close()


async def test_nothing_can_be_sent_on_a_closed_stream(shared: Any) -> None:
    _, _, here, _ = await connected(shared)
    here.close()
    with pytest.raises(PeerUnreachableError):
        await here.send(b"x")


async def test_a_close_wakes_a_receive_on_the_same_side(shared: Any) -> None:
    _, _, here, _ = await connected(shared)
    receiving = asyncio.create_task(here.receive())
    await asyncio.sleep(0)
    here.close()
    with pytest.raises(PeerUnreachableError):
        await receiving


async def test_sending_to_a_peer_that_ended_the_stream_fails(shared: Any) -> None:
    _, _, here, there = await connected(shared)
    there.close()
    await nothing_more(here)
    with pytest.raises(PeerUnreachableError):
        await here.send(b"x")


async def test_a_stream_ends_when_its_handler_returns(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()

    async def greet(stream: Stream) -> None:
        await stream.send(b"hi and bye")

    await server.listen("greet", greet)
    stream = await client.open(server.peer_id, "greet", server.addresses)
    assert await stream.receive() == b"hi and bye"
    await nothing_more(stream)


async def test_a_handler_that_fails_ends_its_own_stream_only(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()

    async def fail_on_bad(stream: Stream) -> None:
        while True:
            frame = await stream.receive()
            if frame == b"bad":
                raise RuntimeError("cannot")
            await stream.send(frame)

    await server.listen("fragile", fail_on_bad)
    bad = await client.open(server.peer_id, "fragile", server.addresses)
    good = await client.open(server.peer_id, "fragile", server.addresses)
    await bad.send(b"bad")
    await nothing_more(bad)
    await good.send(b"good")
    assert await good.receive() == b"good"


async def test_a_killed_peers_streams_end(world: Any) -> None:
    _, server, here, _ = await connected(world)
    world.kill(server)
    await nothing_more(here)


async def test_a_closed_transports_streams_end(world: Any) -> None:
    _, server, here, _ = await connected(world)
    await server.close()
    await nothing_more(here)


async def test_a_closed_transport_cancels_its_handlers(world: Any) -> None:
    server, client = await world.peer(), await world.peer()
    entered, ended = asyncio.Event(), asyncio.Event()

    async def wait_for_ever(stream: Stream) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await server.listen("wait", wait_for_ever)
    await client.open(server.peer_id, "wait", server.addresses)
    await entered.wait()
    await server.close()
    assert ended.is_set()


async def test_a_name_that_is_served_no_longer_is_unreachable(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()
    await server.listen("for a while", echo)
    await (await client.open(server.peer_id, "for a while", server.addresses)).send(b"x")
    await server.unlisten("for a while")
    with pytest.raises(PeerUnreachableError):
        await (await client.open(server.peer_id, "for a while", server.addresses)).receive()


async def test_the_streams_of_a_name_that_is_served_no_longer_end(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()
    entered, ended = asyncio.Event(), asyncio.Event()

    async def wait_for_ever(stream: Stream) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await server.listen("for a while", wait_for_ever)
    here = await client.open(server.peer_id, "for a while", server.addresses)
    await entered.wait()
    await server.unlisten("for a while")
    assert ended.is_set()
    await nothing_more(here)


async def test_the_streams_of_other_names_go_on(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()
    for name in ("one", "other"):
        await server.listen(name, echo)
    here = await client.open(server.peer_id, "other", server.addresses)
    await server.unlisten("one")
    await here.send(b"still here")
    assert await here.receive() == b"still here"


async def test_a_name_may_be_served_again(shared: Any) -> None:
    server, client = await shared.peer(), await shared.peer()
    await server.listen("again", echo)
    await server.unlisten("again")
    await server.listen("again", echo)
    here = await client.open(server.peer_id, "again", server.addresses)
    await here.send(b"hello")
    assert await here.receive() == b"hello"


async def test_a_transport_may_be_closed_twice(world: Any) -> None:
    peer = await world.peer()
    await peer.close()
    await peer.close()


@pytest.mark.parametrize("what", ["listen", "open", "store", "fetch"])
async def test_a_closed_transport_says_so(world: Any, what: str) -> None:
    peer = await world.peer()
    await peer.close()
    calls = {
        "listen": lambda: peer.listen("echo", echo),
        "open": lambda: peer.open(Identity().peer_id, "echo"),
        "store": lambda: peer.store([("k", b"v")], time.time() + 60),
        "fetch": lambda: peer.fetch(["k"]),
    }
    with pytest.raises(TransportError, match="closed"):
        await calls[what]()


async def test_ones_own_streams_end_with_the_transport(world: Any) -> None:
    client, _, here, _ = await connected(world)
    await client.close()
    with pytest.raises(TransportError):
        await here.receive()


async def test_close_leaves_no_task(world: Any) -> None:
    before = own_tasks()
    client, server, here, _ = await connected(world)
    await here.send(b"unread")
    await client.store([("k", b"v")], time.time() + 60)
    await server.fetch(["k"])
    await client.close()
    await server.close()
    assert own_tasks() - before == set()
