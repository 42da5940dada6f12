"""A server's life, as the swarm sees it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus

from swarmkit.clock import Clock
from swarmkit.errors import NoContactError, PeerUnreachableError, TransportError, UsageError
from swarmkit.events import (
    BlocksLoaded,
    DrainStarted,
    LoadProgressed,
    ServerJoined,
    ServerLeft,
    ServingStarted,
)
from swarmkit.models.execution.stage import Stage
from swarmkit.net.connect import TransportFactory
from swarmkit.net.protocol.messages import SESSION, Open, Opened
from swarmkit.net.registry.records import Announcement, ServerState
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork, MemoryTransport
from swarmkit.net.transport.seam import RecordCheck, Transport
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.settings import ServerSettings

from ..conftest import THROUGHPUT
from ..net.worlds import own_tasks
from ..waiting import eventually
from .worlds import HIDDEN, TinyClient, World, hidden_states

NUM_BLOCKS = 5


class Readiness(TaskStatus[None]):
    """What a node calls when it serves."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def started(self, value: None = None) -> None:
        self.event.set()


class ShiftedClock:
    """The computer's clock, whose date can be set forward or back by `shift_s`."""

    now = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.shift_s = 0.0

    def time(self) -> float:
        return time.time() + self.shift_s


class LoneServer:
    """A node with one server."""

    def __init__(self, config: ServerConfig, factory: TransportFactory, clock: Clock) -> None:
        self.node = Node(factory, clock=clock)
        self.server = self.node.add(config)
        self.events = self.server.events
        self.run = self.node.run
        self.request_stop = self.node.request_stop
        self.skip_drain = self.node.skip_drain
        self.crash = self.node.crash

    @property
    def blocks(self) -> tuple[int, int]:
        return self.server.blocks

    @property
    def is_draining(self) -> bool:
        return self.server.serving is not None and self.server.serving.sessions.leaving


class Neighbourhood:
    """A network with an observer, in which servers come and go; `skew_s` is how far its clock is ahead."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.skew_s = 0.0
        self.clock = ShiftedClock()
        """Of the servers."""
        self.network = MemoryNetwork(clock=self.now)
        self.observer = self.network.transport()
        self.registry = Registry(self.observer, self.now)
        self.announced: list[Announcement] = []
        self.running: list[asyncio.Task[None]] = []
        self.transports: list[MemoryTransport] = []

    def now(self) -> float:
        return time.time() + self.skew_s

    async def transport(self, identity: Identity, check: RecordCheck) -> Transport:
        transport = self.network.transport(identity, check)
        self.transports.append(transport)
        told = transport.store

        async def store(records: Any, expires_at: float, service: int = 0) -> int:
            stored = await told(records, expires_at, service)
            self.announced += await self.seen()
            return stored

        transport.store = store  # type: ignore[method-assign]
        return transport

    def node(self, factory: Any = None, settings: ServerSettings | None = None, **config: Any) -> LoneServer:
        return LoneServer(
            ServerConfig(
                checkpoint=self.world.checkpoint,
                settings=settings or ServerSettings().replace(announce_period_s=3000, record_lifetime_s=3600),
                **config,
            ),
            factory or self.transport,
            self.clock,
        )

    async def start(self, **options: Any) -> LoneServer:
        """A server that serves; ended, if it still runs, with the test."""
        node, readiness = self.node(**options), Readiness()
        self.running.append(asyncio.create_task(node.run(task_status=readiness)))
        await readiness.event.wait()
        return node

    async def close(self) -> None:
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        await self.observer.close()

    async def everybody_left(self) -> None:
        await asyncio.gather(*self.running)

    async def seen(self) -> list[Announcement]:
        found = await self.registry.look_up(self.world.checkpoint.fingerprint, NUM_BLOCKS)
        return sorted(found.announcements.values(), key=lambda announcement: announcement.start)

    async def states(self) -> list[ServerState]:
        return [announcement.state for announcement in await self.seen()]

    async def announce(self, start: int, stop: int, state: ServerState, throughput: float = 1.0) -> None:
        """Somebody else's announcement."""
        transport = self.network.transport()
        announcement = Announcement(
            peer_id=transport.peer_id,
            fingerprint=self.world.checkpoint.fingerprint,
            model="tiny",
            num_blocks=NUM_BLOCKS,
            start=start,
            stop=stop,
            state=state,
            throughput=throughput,
            free_cache_tokens=1,
            dtype="float32",
            addresses=(),
            sequence=1,
            expires_at=self.now() + 60,
        )
        await Registry(transport, self.now).announce(announcement)

    async def session_with(self, node: LoneServer) -> TinyClient:
        stream = await self.observer.open(node.node.peer_id, SESSION.endpoint)
        client = TinyClient(MessageStream(stream, SESSION, 2**20), self.world.checkpoint.fingerprint)
        assert isinstance(await client.ask(Open(client.fingerprint, *node.blocks, 8)), Opened)
        return client


@pytest.fixture
async def here(world: World) -> AsyncIterator[Neighbourhood]:
    here = Neighbourhood(world)
    yield here
    await here.close()


# coming


async def test_a_server_is_joining_before_it_is_online(here: Neighbourhood) -> None:
    await here.start(num_blocks=2)
    assert [announcement.state for announcement in here.announced] == ["joining", "online"]


async def test_a_server_that_hears_nobody_at_first_looks_again(
    here: Neighbourhood, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    async def transport(identity: Identity, check: RecordCheck) -> Transport:
        made = await here.transport(identity, check)
        fetch = made.fetch

        async def fetch_at_last(keys: Any) -> Any:
            looks.append("a look")
            if len(looks) == 1:
                raise NoContactError("no other peer of the swarm answers")
            return await fetch(keys)

        monkeypatch.setattr(made, "fetch", fetch_at_last)
        return made

    await here.start(factory=transport, num_blocks=2)
    assert (len(looks) > 1, await here.states()) == (True, ["online"])


async def test_a_server_announces_what_it_serves(here: Neighbourhood) -> None:
    await here.start(blocks=(1, 3), public_name="mine")
    (announcement,) = await here.seen()
    assert (announcement.start, announcement.stop, announcement.public_name) == (1, 3, "mine")


async def test_a_server_announces_what_it_computes_in(here: Neighbourhood) -> None:
    await here.start(num_blocks=1, dtype="bfloat16")
    (announcement,) = await here.seen()
    assert announcement.dtype == "bfloat16"


async def test_a_server_measures_how_fast_it_is(here: Neighbourhood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(THROUGHPUT)
    await here.start(num_blocks=1)
    (announcement,) = await here.seen()
    assert announcement.throughput not in (0, 1.0)  # it takes 1 to be typical until it has measured


async def test_a_server_announces_the_throughput_of_its_settings(here: Neighbourhood) -> None:
    await here.start(num_blocks=1, settings=ServerSettings().replace(throughput=12.5))
    (announcement,) = await here.seen()
    assert announcement.throughput == 12.5


async def test_a_server_announces_how_much_fits(here: Neighbourhood) -> None:
    await here.start(num_blocks=1)
    (announcement,) = await here.seen()
    assert announcement.free_cache_tokens > 0


async def test_a_server_that_announces_itself_serves(here: Neighbourhood) -> None:
    node = await here.start(num_blocks=2)
    client = await here.session_with(node)
    assert (await client.step(hidden_states(1, 2))).shape == (1, 2, HIDDEN)


async def test_a_server_tells_its_life_in_events(here: Neighbourhood) -> None:
    node = here.node(num_blocks=2)
    events = node.events.subscribe()
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.run)
        node.request_stop()
    kinds = list(dict.fromkeys(type(event) for event in events.pending()))
    assert kinds == [ServerJoined, LoadProgressed, BlocksLoaded, ServingStarted, DrainStarted, ServerLeft]


async def test_it_announces_itself_again_and_again(here: Neighbourhood) -> None:
    await here.start(num_blocks=1, settings=ServerSettings().replace(announce_period_s=0.01))
    first = here.announced[-1].sequence
    await eventually(lambda: here.announced[-1].sequence != first, "the server announces itself again")
    assert here.announced[-1].state == "online"


# choosing


async def test_the_first_of_several_takes_the_first_blocks(here: Neighbourhood) -> None:
    node = await here.start(num_blocks=2)
    assert node.blocks == (0, 2)


async def test_a_server_takes_what_nobody_serves(here: Neighbourhood) -> None:
    await here.announce(0, 3, "online")
    node = await here.start(num_blocks=2)
    assert node.blocks == (3, 5)


async def test_a_server_strengthens_the_weakest_blocks(here: Neighbourhood) -> None:
    await here.announce(0, 2, "online", throughput=1.0)
    await here.announce(2, 5, "online", throughput=9.0)
    node = await here.start(num_blocks=2)
    assert node.blocks == (0, 2)


async def test_servers_that_are_still_loading_count(here: Neighbourhood) -> None:
    await here.announce(0, 3, "joining")
    node = await here.start(num_blocks=2)
    assert node.blocks == (3, 5)


async def test_servers_that_leave_do_not_count(here: Neighbourhood) -> None:
    await here.announce(0, 3, "leaving")
    node = await here.start(num_blocks=2)
    assert node.blocks == (0, 2)


async def test_a_server_serves_what_it_is_told_to(here: Neighbourhood) -> None:
    await here.announce(2, 4, "online")
    node = await here.start(blocks=(2, 4))
    assert node.blocks == (2, 4)


@pytest.mark.parametrize("blocks", [(0, 6), (3, 3), (-1, 2)])
async def test_blocks_outside_the_model_are_a_mistake(here: Neighbourhood, blocks: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="0:5"):
        here.node(blocks=blocks)


@pytest.mark.parametrize("num_blocks", [0, 6])
async def test_more_blocks_than_there_are_is_a_mistake(here: Neighbourhood, num_blocks: int) -> None:
    with pytest.raises(UsageError, match="1 to 5"):
        here.node(num_blocks=num_blocks)


# leaving


async def test_a_server_that_stops_leaves_word(here: Neighbourhood) -> None:
    node = await here.start(num_blocks=1)
    node.request_stop()
    await here.everybody_left()
    assert await here.states() == ["leaving"]


async def test_a_server_that_stops_waits_for_its_sessions(here: Neighbourhood) -> None:
    node = await here.start(num_blocks=1)
    client = await here.session_with(node)
    node.request_stop(drain_timeout=60)
    await eventually(lambda: node.is_draining, "the server drains")
    output = await client.step(hidden_states(1, 1))
    client.close()
    await here.everybody_left()
    assert output.shape == (1, 1, HIDDEN)


@pytest.mark.parametrize("why", ["no time", "skip_drain"])
async def test_a_server_does_not_wait_for_ever(here: Neighbourhood, why: str) -> None:
    node = await here.start(num_blocks=1)
    await here.session_with(node)
    node.request_stop(drain_timeout=0.0 if why == "no time" else 600.0)
    if why == "skip_drain":
        await eventually(lambda: node.is_draining, "the server drains")
        node.skip_drain()
    await here.everybody_left()


async def test_the_word_of_a_crashed_server_stands_until_it_expires(here: Neighbourhood) -> None:
    node = await here.start(num_blocks=1)
    node.crash()
    await here.everybody_left()
    at_once = await here.states()
    here.skew_s = 3601.0
    assert (at_once, await here.states()) == (["online"], [])


async def test_a_clock_that_is_set_back_does_not_hide_later_announcements(here: Neighbourhood) -> None:
    node = await here.start(num_blocks=1)
    here.clock.shift_s = -1000.0
    node.request_stop()
    await here.everybody_left()
    assert await here.states() == ["leaving"]


async def test_a_server_that_crashes_says_nothing_more(here: Neighbourhood) -> None:
    node = await here.start(num_blocks=1)
    client = await here.session_with(node)
    engine = node.server.serving.engine
    compute = engine.step

    async def compute_and_crash(*args: Any) -> Any:
        answer = await compute(*args)
        node.crash()
        return answer

    engine.step = compute_and_crash  # type: ignore[method-assign]
    with pytest.raises(PeerUnreachableError):
        await client.step(hidden_states(1, 1))
    await here.everybody_left()


# failing


@pytest.mark.parametrize("how", ["stop", "crash", "cancel"])
async def test_whatever_ends_it_no_task_is_left(world: World, how: str) -> None:
    before = own_tasks()
    here = Neighbourhood(world)
    node = await here.start(num_blocks=1)
    await here.session_with(node)
    if how == "stop":
        node.request_stop(drain_timeout=0.0)
    elif how == "crash":
        node.crash()
    if how != "cancel":
        await here.everybody_left()
    await here.close()
    assert own_tasks() == before


async def test_a_load_that_fails_closes_the_transport(
    here: Neighbourhood, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> Stage:
        raise MemoryError("too little")

    monkeypatch.setattr(Stage, "load", fails)
    node = here.node(num_blocks=1)
    with pytest.raises(MemoryError):
        await node.run()
    with pytest.raises(TransportError):
        await here.transports[0].fetch(["anything"])


async def test_a_transport_that_does_not_start_is_the_servers_error(here: Neighbourhood) -> None:
    async def fails(identity: Identity, check: RecordCheck) -> Transport:
        raise TransportError("no daemon")

    with pytest.raises(TransportError, match="no daemon"):
        await here.node(factory=fails).run()


def with_failing_store(here: Neighbourhood, failures: list[bool]) -> Any:
    """Transports whose table fails as often as `failures` says, once the server is online."""

    async def create(identity: Identity, check: RecordCheck) -> Transport:
        transport = here.network.transport(identity, check)
        works = transport.store

        async def store(records: Any, expires_at: float, service: int = 0) -> int:
            if (await here.states()) == ["online"] and failures and failures.pop():
                raise TransportError("the table is away")
            return await works(records, expires_at, service)

        transport.store = store  # type: ignore[method-assign]
        return transport

    return create


async def test_a_server_survives_a_table_that_is_away_for_a_while(
    here: Neighbourhood, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [False, True, True]
    with caplog.at_level(logging.WARNING):
        await here.start(
            factory=with_failing_store(here, failures),
            settings=ServerSettings().replace(announce_period_s=0.01, record_lifetime_s=60),
            num_blocks=1,
        )
        await eventually(lambda: not failures, "the table has failed twice and worked again")
    assert caplog.text.count("will try again") == 2


async def test_a_server_that_nobody_can_know_of_any_more_ends_with_the_reason(here: Neighbourhood) -> None:
    node = here.node(
        factory=with_failing_store(here, [True] * 10_000),
        settings=ServerSettings().replace(announce_period_s=0.01, record_lifetime_s=0.2),
        num_blocks=1,
    )
    here.skew_s = -1.0  # the observer still sees the record that has expired for the server
    with pytest.raises(TransportError, match="the table is away"):
        await node.run()


async def test_a_server_leaves_in_good_order_even_if_it_cannot_say_so(here: Neighbourhood) -> None:
    node = await here.start(factory=with_failing_store(here, [True]), num_blocks=1)
    node.request_stop()
    await here.everybody_left()
    assert await here.states() == ["online"]
