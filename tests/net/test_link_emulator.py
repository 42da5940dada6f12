"""The link emulator between real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from swarmkit.errors import TransportError, UsageError
from swarmkit.net.emulation.link_emulator import LinkEmulator
from swarmkit.net.emulation.link_schedule import EmulatedLink

from ..waiting import eventually
from .worlds import own_tasks

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

DELAY = EmulatedLink(delay_s=0.05)
PATIENCE_S = 30


@dataclass
class Line:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def read(self, nbytes: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(nbytes), PATIENCE_S)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection, however it ends."""
        found = b""
        try:
            while data := await asyncio.wait_for(self.reader.read(65536), PATIENCE_S):
                found += data
        except ConnectionError:
            pass
        return found

    async def is_quiet(self) -> bool:
        """Whether nothing arrives for a moment, not even an end."""
        try:
            await asyncio.wait_for(self.reader.read(1), 0.1)
        except asyncio.TimeoutError:
            return True
        return False

    async def is_held_up(self) -> bool:
        """Whether what was written is not taken for a moment."""
        try:
            await asyncio.wait_for(self.writer.drain(), 0.3)
        except asyncio.TimeoutError:
            return True
        return False


@dataclass
class EmulatedNetwork:
    """A port where lines come in, and links in front of it."""

    port: int = 0
    incoming: asyncio.Queue[Line] = field(default_factory=asyncio.Queue)
    links: list[LinkEmulator] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    async def link(
        self, inbound: EmulatedLink, outbound: EmulatedLink | None = None, **options: int
    ) -> LinkEmulator:
        self.links.append(await LinkEmulator.open(("127.0.0.1", self.port), inbound, outbound, **options))
        return self.links[-1]

    async def dial(self, link: LinkEmulator) -> Line:
        self.lines.append(Line(*await asyncio.open_connection(link.host, link.port)))
        return self.lines[-1]

    async def connect(self, link: LinkEmulator) -> tuple[Line, Line]:
        """Both ends of a new connection over the link."""
        near = await self.dial(link)
        far = await asyncio.wait_for(self.incoming.get(), PATIENCE_S)
        self.lines.append(far)
        return near, far


@pytest.fixture
async def world() -> AsyncIterator[EmulatedNetwork]:
    world = EmulatedNetwork()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await world.incoming.put(Line(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    world.port = server.sockets[0].getsockname()[1]
    yield world
    for link in world.links:
        await link.close()
    for line in world.lines:
        line.writer.close()
    server.close()


async def seconds_to_arrive(sender: Line, receiver: Line, data: bytes = b"x") -> float:
    began = time.perf_counter()
    sender.writer.write(data)
    await receiver.read(len(data))
    return time.perf_counter() - began


# what passes


@pytest.mark.parametrize(
    "link",
    [
        EmulatedLink(),
        DELAY,
        EmulatedLink(jitter_s=0.01),
        EmulatedLink(bandwidth=200e6, delay_s=0.01, jitter_s=0.005),
    ],
    ids=["plain", "delay", "jitter", "everything"],
)
async def test_bytes_arrive_whole_and_in_order(world: EmulatedNetwork, link: EmulatedLink) -> None:
    near, far = await world.connect(await world.link(link))
    data = bytes(range(256)) * 2000
    for start in range(0, len(data), 10_000):
        near.writer.write(data[start : start + 10_000])
        await asyncio.sleep(0)
    assert await far.read(len(data)) == data


async def test_what_is_sent_before_the_other_side_is_there_arrives(world: EmulatedNetwork) -> None:
    near = await world.dial(await world.link(DELAY))
    near.writer.write(b"early")
    near.writer.close()
    assert await (await world.incoming.get()).rest() == b"early"


async def test_each_direction_counts_its_bytes(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    near, far = await world.connect(link)
    near.writer.write(b"12345")
    await far.read(5)
    far.writer.write(b"123")
    await near.read(3)
    assert (link.inbound_bytes, link.outbound_bytes) == (5, 3)


# how long it takes: never less than was asked for


async def test_a_delay_is_kept_in_each_direction(world: EmulatedNetwork) -> None:
    near, far = await world.connect(await world.link(EmulatedLink(delay_s=0.05), EmulatedLink(delay_s=0.1)))
    assert await seconds_to_arrive(near, far) >= 0.05
    assert await seconds_to_arrive(far, near) >= 0.1


async def test_a_narrow_link_takes_its_time(world: EmulatedNetwork) -> None:
    near, far = await world.connect(await world.link(EmulatedLink(bandwidth=8e5)))
    assert await seconds_to_arrive(near, far, bytes(20_000)) >= 0.2


async def test_connections_share_the_bandwidth(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink(bandwidth=8e5))
    (one, other_one), (two, other_two) = [await world.connect(link) for _ in range(2)]
    began = time.perf_counter()
    one.writer.write(bytes(10_000))
    two.writer.write(bytes(10_000))
    await asyncio.gather(other_one.read(10_000), other_two.read(10_000))
    assert time.perf_counter() - began >= 0.2


async def test_a_link_can_be_changed_while_it_is_used(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    near, far = await world.connect(link)
    link.change(inbound=DELAY)
    assert await seconds_to_arrive(near, far) >= 0.05


async def test_a_faster_link_does_not_overtake_what_is_under_way(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink(delay_s=0.2))
    near, far = await world.connect(link)
    near.writer.write(b"first")
    await asyncio.sleep(0.05)  # until the link has it
    link.change(inbound=EmulatedLink())
    near.writer.write(b"second")
    assert await far.read(11) == b"firstsecond"


async def test_a_new_connection_waits_for_a_round_trip(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink(delay_s=0.05), EmulatedLink(delay_s=0.1))
    began = time.perf_counter()
    await world.connect(link)
    assert time.perf_counter() - began >= 0.15


# backpressure


async def test_a_full_link_holds_up_the_sender(world: EmulatedNetwork) -> None:
    near, _ = await world.connect(await world.link(EmulatedLink(bandwidth=1e4, queue_bytes=1000)))
    near.writer.write(bytes(64 * 1024 * 1024))
    assert await near.is_held_up()


async def test_a_receiver_that_does_not_read_holds_up_the_sender(world: EmulatedNetwork) -> None:
    near, _ = await world.connect(await world.link(EmulatedLink()))
    near.writer.write(bytes(64 * 1024 * 1024))
    assert await near.is_held_up()


async def test_a_sender_that_was_held_up_goes_on_when_it_is_read(world: EmulatedNetwork) -> None:
    near, far = await world.connect(await world.link(EmulatedLink(delay_s=0.01, queue_bytes=1000)))
    data = bytes(8 * 1024 * 1024)
    near.writer.write(data)
    assert await far.read(len(data)) == data


# ends and cuts


async def test_the_end_of_a_connection_arrives_after_what_was_sent(world: EmulatedNetwork) -> None:
    near, far = await world.connect(await world.link(DELAY))
    near.writer.write(b"bye")
    near.writer.close()
    assert await far.rest() == b"bye"


async def test_half_a_connection_may_end(world: EmulatedNetwork) -> None:
    near, far = await world.connect(await world.link(DELAY))
    near.writer.write(b"question")
    near.writer.write_eof()
    question = await far.rest()
    far.writer.write(b"answer")
    far.writer.close()
    assert (question, await near.rest()) == (b"question", b"answer")


async def test_an_ended_connection_is_forgotten(world: EmulatedNetwork) -> None:
    link = await world.link(DELAY)
    near, far = await world.connect(link)
    near.writer.close()
    await far.rest()
    far.writer.close()
    await eventually(lambda: not link.num_connections, "the connection is forgotten")
    assert own_tasks() == set()


async def test_nobody_behind_the_link_is_the_end_of_the_connection(world: EmulatedNetwork) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with await LinkEmulator.open(unused.getsockname(), EmulatedLink()) as link:
            assert await (await world.dial(link)).rest() == b""


async def test_a_drop_ends_both_sides_and_loses_what_is_under_way(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    near, far = await world.connect(link)
    link.change(inbound=EmulatedLink(delay_s=10))
    near.writer.write(b"lost")
    link.drop()
    assert (await near.rest(), await far.rest()) == (b"", b"")


async def test_after_a_drop_new_connections_are_welcome(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    await world.connect(link)
    link.drop()
    near, far = await world.connect(link)
    near.writer.write(b"x")
    assert await far.read(1) == b"x"


async def test_a_refusing_link_ends_connections_old_and_new(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    old, _ = await world.connect(link)
    link.refuse()
    assert (await old.rest(), await (await world.dial(link)).rest()) == (b"", b"")
    assert world.incoming.empty()


@pytest.mark.parametrize("how", ["time", "heal"])
async def test_a_refusal_ends(world: EmulatedNetwork, how: str) -> None:
    link = await world.link(EmulatedLink())
    link.refuse(0.05 if how == "time" else 1000)
    if how == "heal":
        link.heal()
    else:
        await asyncio.sleep(0.1)
    near, far = await world.connect(link)
    near.writer.write(b"x")
    assert await far.read(1) == b"x"


async def test_a_silent_link_delivers_nothing_and_ends_nothing(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    near, far = await world.connect(link)
    link.silence()
    near.writer.write(b"x")
    far.writer.write(b"y")
    assert (await near.is_quiet(), await far.is_quiet()) == (True, True)


async def test_a_silent_link_does_not_even_tell_of_the_end(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    near, far = await world.connect(link)
    link.silence()
    near.writer.close()
    assert await far.is_quiet()


async def test_a_link_may_be_silent_in_one_direction(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    near, far = await world.connect(link)
    link.silence(outbound=False)
    near.writer.write(b"x")
    far.writer.write(b"y")
    assert (await near.read(1), await far.is_quiet()) == (b"y", True)


async def test_what_a_silent_link_held_arrives_when_it_heals(world: EmulatedNetwork) -> None:
    link = await world.link(DELAY)
    near, far = await world.connect(link)
    link.silence()
    near.writer.write(b"held")
    assert await far.is_quiet()
    link.heal()
    assert await far.read(4) == b"held"


async def test_a_silent_link_holds_up_the_sender(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    near, _ = await world.connect(link)
    link.silence()
    near.writer.write(bytes(64 * 1024 * 1024))
    assert await near.is_held_up()


# life


async def test_a_link_is_programmed_from_another_thread(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    near, _ = await world.connect(link)
    thread = threading.Thread(target=link.drop)
    thread.start()
    ended = await near.rest()
    await asyncio.to_thread(thread.join)
    assert ended == b""


async def test_closing_ends_all_connections_and_tasks(world: EmulatedNetwork) -> None:
    link = await world.link(DELAY)
    near, far = await world.connect(link)
    await world.dial(link)  # which is still on its way
    await link.close()
    assert (await near.rest(), await far.rest()) == (b"", b"")
    assert (link.num_connections, own_tasks()) == (0, set())


async def test_a_closed_link_says_so(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    await link.close()
    await link.close()
    with pytest.raises(UsageError, match="closed"):
        link.drop()


async def test_a_port_in_use_is_named(world: EmulatedNetwork) -> None:
    with pytest.raises(TransportError, match=str(world.port)):
        await world.link(EmulatedLink(), port=world.port)


async def test_the_address_is_what_peers_dial(world: EmulatedNetwork) -> None:
    link = await world.link(EmulatedLink())
    assert link.address == f"/ip4/127.0.0.1/tcp/{link.port}"
