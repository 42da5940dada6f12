"""Streams that leave the daemons aside: when they come about, and what nobody can do to them."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from swarmkit.errors import PeerUnreachableError, ProtocolError
from swarmkit.net.hivemind.direct import DirectListener, Offer, SealedStream, connect_directly
from swarmkit.net.hivemind.framing import FrameStream

from .worlds import HivemindWorld, collector, echo

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

HOST = "127.0.0.1"


class Ends:
    """A listener, and all that it and its visitors started."""

    def __init__(self) -> None:
        self.streams: list[FrameStream] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.listener: DirectListener

    def spawn(self, coroutine: Any) -> None:
        self.tasks.append(asyncio.create_task(coroutine))

    async def take_up(self, offer: Offer, timeout: float = 5.0) -> SealedStream | None:
        return await connect_directly("server", offer, [HOST], self.streams.append, timeout)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ends = Ends()
    listener = await DirectListener.open([HOST], ends.streams.append, ends.spawn)
    assert listener is not None
    ends.listener = listener
    yield ends
    listener.close()
    for stream in ends.streams:
        stream.close()
    await asyncio.gather(*ends.tasks)


async def pair(ends: Ends) -> tuple[SealedStream, SealedStream]:
    """Opener and server."""
    with ends.listener.offer("opener") as expected:
        opener = await ends.take_up(expected.offer)
        assert opener is not None
        return opener, expected.take()


async def test_frames_go_both_ways(ends: Ends) -> None:
    opener, server = await pair(ends)
    await opener.send(b"to ", b"you")
    await server.send(b"x" * 300_000)
    assert (await server.receive(), len(await opener.receive())) == (b"to you", 300_000)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system's sockets have other options")
async def test_the_kernel_asks_after_a_silent_machine_within_the_time_that_is_set(ends: Ends) -> None:
    connection = socket.create_connection((HOST, ends.listener.port))
    connection.setblocking(False)
    stream = SealedStream(silence_s=60.0)
    await asyncio.get_running_loop().create_connection(lambda: stream, sock=connection)
    ends.streams.append(stream)

    def option(name: int) -> int:
        return connection.getsockopt(socket.IPPROTO_TCP, name)

    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    probing_s = option(socket.TCP_KEEPINTVL) * option(socket.TCP_KEEPCNT)
    assert option(socket.TCP_KEEPIDLE) + probing_s == 60
    assert option(socket.TCP_USER_TIMEOUT) == 60_000


async def test_each_end_knows_the_other(ends: Ends) -> None:
    opener, server = await pair(ends)
    assert (opener.peer_id, server.peer_id) == ("server", "opener")


async def test_a_ticket_admits_once(ends: Ends) -> None:
    with ends.listener.offer("opener") as expected:
        first = await ends.take_up(expected.offer)
        second = await ends.take_up(expected.offer)
    assert (first is None, second) == (False, None)


async def test_a_ticket_is_no_good_after_its_time(ends: Ends) -> None:
    with ends.listener.offer("opener") as expected:
        pass
    assert await ends.take_up(expected.offer) is None


async def test_a_stranger_gets_nothing(ends: Ends) -> None:
    with ends.listener.offer("opener") as expected:
        guessed = Offer(expected.offer.port, b"g" * 32, expected.offer.to_server, expected.offer.to_opener)
        assert await ends.take_up(guessed) is None


async def test_who_knows_the_ticket_but_not_the_keys_reads_and_says_nothing(ends: Ends) -> None:
    """As one who has seen the ticket pass, and is faster."""
    with ends.listener.offer("opener") as expected:
        seen = Offer(expected.offer.port, expected.offer.ticket, b"k" * 32, b"k" * 32)
        assert await ends.take_up(seen) is None
        server = expected.take()
    with pytest.raises((ProtocolError, PeerUnreachableError)):
        await server.receive()


async def test_nothing_in_the_clear_is_taken_behind_a_ticket(ends: Ends) -> None:
    with ends.listener.offer("opener") as expected:
        reader, writer = await asyncio.open_connection(HOST, expected.offer.port)
        frames = [expected.offer.ticket, b"unsealed"]
        writer.write(b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames))
        assert await reader.read() == b""
        assert expected.stream is None
    writer.close()


async def test_a_long_first_frame_is_not_taken(ends: Ends) -> None:
    reader, writer = await asyncio.open_connection(HOST, ends.listener.port)
    writer.write((33).to_bytes(4, "big"))
    assert await reader.read() == b""
    writer.close()


class Relay:
    """Stands between the two ends, writes down what passes, and may change it."""

    def __init__(self, port: int, change_at: int | None = None) -> None:
        self._port = port
        self._change_at = change_at
        self.passed = bytearray()
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *rest: object) -> None:
        self._server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _serve(self, reader: Any, writer: Any) -> None:
        there_reader, there_writer = await asyncio.open_connection(HOST, self._port)
        self.tasks = [
            asyncio.create_task(self._carry(reader, there_writer, self._change_at)),
            asyncio.create_task(self._carry(there_reader, writer, None)),
        ]

    async def _carry(self, reader: Any, writer: Any, change_at: int | None) -> None:
        for position in itertools.count():
            if not (byte := await reader.read(1)):
                break
            self.passed += byte
            writer.write(bytes([byte[0] ^ 1]) if position == change_at else byte)
        writer.close()


async def test_what_passes_cannot_be_read(ends: Ends) -> None:
    with ends.listener.offer("opener") as expected:
        offer = expected.offer
        async with Relay(offer.port) as relay:
            opener = await ends.take_up(Offer(relay.port, offer.ticket, offer.to_server, offer.to_opener))
            assert opener is not None
            server = expected.take()
            await opener.send(b"a secret of mine")
            assert await server.receive() == b"a secret of mine"
            assert b"secret" not in relay.passed


async def test_what_was_changed_on_its_way_ends_the_stream(ends: Ends) -> None:
    with ends.listener.offer("opener") as expected:
        offer = expected.offer
        behind_the_ticket = 4 + 32 + 4 + 5
        async with Relay(offer.port, change_at=behind_the_ticket) as relay:
            opener = await ends.take_up(Offer(relay.port, offer.ticket, offer.to_server, offer.to_opener))
            assert opener is not None
            server = expected.take()
            await opener.send(b"pay 10 to Ann")
            with pytest.raises(ProtocolError, match="changed on its way"):
                await server.receive()


async def test_a_frame_cannot_come_twice(ends: Ends) -> None:
    opener, server = await pair(ends)
    frame = opener.outgoing((b"once",))[0]
    sealed = len(frame).to_bytes(4, "big") + bytes(frame)
    assert opener._transport is not None
    opener._transport.write(sealed + sealed)
    assert await server.receive() == b"once"
    with pytest.raises(ProtocolError):
        await server.receive()


# over libp2p


@pytest.fixture
async def world() -> AsyncIterator[HivemindWorld]:
    world = HivemindWorld()
    yield world
    await world.close()


async def test_peers_that_can_reach_each_other_talk_directly(world: HivemindWorld) -> None:
    server, client = await world.peer(), await world.peer(client_mode=True)
    handler, streams = collector()
    await server.listen("talk", handler)
    opened = await client.open(server.peer_id, "talk", server.addresses)
    served = await streams.get()
    assert [type(opened), type(served)] == [SealedStream, SealedStream]
    assert (opened.peer_id, served.peer_id) == (server.peer_id, client.peer_id)


async def test_where_the_port_is_closed_the_daemons_carry_the_stream(world: HivemindWorld) -> None:
    server: Any
    server, client = await world.peer(), await world.peer()
    await server.listen("echo", echo)
    server._direct.close()
    for _ in range(2):
        stream = await client.open(server.peer_id, "echo", server.addresses)
        await stream.send(b"hello")
        assert (type(stream), await stream.receive()) == (FrameStream, b"hello")


async def test_who_is_seen_elsewhere_than_it_listens_offers_nothing(world: HivemindWorld) -> None:
    server: Any = await world.peer(announce_maddrs=["/ip4/127.0.0.1/tcp/9"])
    assert server._direct is None


@pytest.mark.parametrize("answer", [b"\x93", b"\x94\x00\x01\x02\x03", b"anything"])
async def test_an_offer_that_makes_no_sense_is_none(answer: bytes) -> None:
    assert Offer.from_bytes(answer) is None
