"""Streams that leave the daemons aside: when they come about, and what nobody can do to them."""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from swarmkit.errors import PeerUnreachableError, ProtocolError
from swarmkit.net.hivemind.direct import (
    MOST_STRANGERS,
    DirectListener,
    Offer,
    SealedStream,
    connect_directly,
)
from swarmkit.net.hivemind.direct_tries import DirectOutcome
from swarmkit.net.hivemind.framing import FrameStream

from .worlds import HivemindWorld, collector, echo

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

HOST = "127.0.0.1"


class Ends:
    """A listener, and all that it and its visitors started."""

    def __init__(self) -> None:
        self.streams: list[FrameStream] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.listener: DirectListener

    def spawn(self, coroutine: Any) -> None:
        self.tasks.append(asyncio.create_task(coroutine))

    async def take_up(self, offer: Offer) -> SealedStream | None:
        return (await self.outcome(offer))[0]

    async def outcome(self, offer: Offer) -> tuple[SealedStream | None, DirectOutcome]:
        return await connect_directly("server", offer, [HOST], self.streams.append, 5.0)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ends = Ends()
    listener = await DirectListener.open([HOST], ends.streams.append, ends.spawn)
    assert listener is not None
    ends.listener = listener
    yield ends
    listener.close()
    for end in (*ends.streams, *ends.writers):
        end.close()
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


TICKET_BYTES = 4 + 32
"""That pass before the first sealed frame."""


class Relay:
    """Stands between the two ends, writes down what passes, and may change it.

    Args: edit: what passes on of each byte from the opener, by its position.
    """

    def __init__(self, port: int, edit: Callable[[int, bytes], bytes] = lambda position, byte: byte) -> None:
        self._port = port
        self._edit = edit
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
            asyncio.create_task(self._carry(reader, there_writer, self._edit)),
            asyncio.create_task(self._carry(there_reader, writer, lambda position, byte: byte)),
        ]

    async def _carry(self, reader: Any, writer: Any, edit: Callable[[int, bytes], bytes]) -> None:
        for position in itertools.count():
            if not (byte := await reader.read(1)):
                break
            self.passed += byte
            writer.write(edit(position, byte))
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
        behind_the_ticket = TICKET_BYTES + 4 + 5

        def change(position: int, byte: bytes) -> bytes:
            return bytes([byte[0] ^ 1]) if position == behind_the_ticket else byte

        async with Relay(offer.port, change) as relay:
            opener = await ends.take_up(Offer(relay.port, offer.ticket, offer.to_server, offer.to_opener))
            assert opener is not None
            server = expected.take()
            await opener.send(b"pay 10 to Ann")
            with pytest.raises(ProtocolError, match="changed on its way"):
                await server.receive()


async def test_a_frame_cannot_come_twice(ends: Ends) -> None:
    with ends.listener.offer("opener") as expected:
        offer = expected.offer
        whole = 4 + len(b"once") + 16
        frame = bytearray()

        def repeat(position: int, byte: bytes) -> bytes:
            if position < TICKET_BYTES:
                return byte
            frame.extend(byte)
            return byte + bytes(frame) if len(frame) == whole else byte

        async with Relay(offer.port, repeat) as relay:
            opener = await ends.take_up(Offer(relay.port, offer.ticket, offer.to_server, offer.to_opener))
            assert opener is not None
            server = expected.take()
            await opener.send(b"once")
            assert await server.receive() == b"once"
            with pytest.raises(ProtocolError):
                await server.receive()


# strangers at the door


async def strangers(ends: Ends, number: int, host: str = HOST) -> list[asyncio.StreamReader]:
    """So many connections from one host that say nothing; what they read."""
    readers = []
    for _ in range(number):
        reader, writer = await asyncio.open_connection(HOST, ends.listener.port, local_addr=(host, 0))
        ends.writers.append(writer)
        readers.append(reader)
    return readers


ANOTHER_HOST = pytest.param(
    "127.0.0.2",
    marks=pytest.mark.skipif(sys.platform != "linux", reason="this system has one loopback address only"),
    id="of another host",
)


@pytest.mark.parametrize("host", [pytest.param(HOST, id="of its own host"), ANOTHER_HOST])
async def test_a_client_gets_in_beside_a_stranger_that_holds_all_connections(ends: Ends, host: str) -> None:
    await strangers(ends, 2 * MOST_STRANGERS, host)
    opener, server = await pair(ends)
    await opener.send(b"here")
    assert await server.receive() == b"here"


async def test_of_a_strangers_connections_the_oldest_ends(ends: Ends) -> None:
    first, second, *_ = await strangers(ends, MOST_STRANGERS + 1)
    assert await first.read() == b""
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(second.read(), 0.05)


async def test_a_client_knows_whether_it_was_turned_away_or_reached_nobody(ends: Ends) -> None:
    with ends.listener.offer("opener") as expected:
        unknown = Offer(expected.offer.port, b"u" * 32, expected.offer.to_server, expected.offer.to_opener)
        assert await ends.outcome(unknown) == (None, "turned away")
        ends.listener.close()
        assert await ends.outcome(expected.offer) == (None, "not reached")


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


@pytest.fixture
def listeners(monkeypatch: pytest.MonkeyPatch) -> list[DirectListener]:
    """Those that are opened."""
    opened: list[DirectListener] = []
    open_one = DirectListener.open

    async def noted(*args: Any) -> DirectListener | None:
        listener = await open_one(*args)
        assert listener is not None
        opened.append(listener)
        return listener

    monkeypatch.setattr(DirectListener, "open", noted)
    return opened


async def test_where_the_port_is_closed_the_daemons_carry_the_stream(
    world: HivemindWorld, listeners: list[DirectListener]
) -> None:
    server, client = await world.peer(), await world.peer()
    await server.listen("echo", echo)
    listeners[0].close()
    for _ in range(2):
        stream = await client.open(server.peer_id, "echo", server.addresses)
        await stream.send(b"hello")
        assert (type(stream), await stream.receive()) == (FrameStream, b"hello")


async def test_who_is_seen_elsewhere_than_it_listens_offers_nothing(
    world: HivemindWorld, listeners: list[DirectListener]
) -> None:
    await world.peer(announce_maddrs=["/ip4/127.0.0.1/tcp/9"])
    assert listeners == []


@pytest.mark.parametrize("answer", [b"\x93", b"\x94\x00\x01\x02\x03", b"anything"])
async def test_an_offer_that_makes_no_sense_is_none(answer: bytes) -> None:
    assert Offer.from_bytes(answer) is None
