"""Blocks that a server is told to serve are loaded while its node joins the swarm."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from swarmkit.errors import ModelError, TransportError
from swarmkit.models.check import ensure_servable
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import RecordCheck, Transport
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.server.head_start import HeadStart

from ..waiting import eventually
from .worlds import World

PATIENCE_S = 30.0

Joining = Callable[[], Awaitable[None]]


class Loads:
    """Counts loads; `began` is set by the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[tuple[int, int]] = []
        self.began = threading.Event()
        self.failures: list[Exception] = []
        """Of the loads to come."""
        self.endless = False
        """Whether a load goes on until it is given up."""
        self._load = Stage.load
        monkeypatch.setattr(Stage, "load", self.load)

    def load(self, checkpoint: Checkpoint, start: int, stop: int, **options: Any) -> Stage:
        self.blocks.append((start, stop))
        self.began.set()
        while self.endless:
            options["on_tensor"]()
        if self.failures:
            raise self.failures.pop(0)
        return self._load(checkpoint, start, stop, **options)

    async def have_begun(self) -> None:
        await eventually(self.began.is_set, "a load")


@pytest.fixture
def loads(world: World, monkeypatch: pytest.MonkeyPatch) -> Loads:
    ensure_servable(world.checkpoint.config)  # the first check in a process loads parts of a small model
    return Loads(monkeypatch)


async def at_once() -> None:
    """Join without delay."""


@asynccontextmanager
async def node_of(world: World, joining: Joining = at_once, **config: Any) -> AsyncIterator[Node]:
    """A node with one server, which serves within the block; `joining` is what its joining takes."""
    network = MemoryNetwork()

    async def transport(identity: Identity, check: RecordCheck) -> Transport:
        await joining()
        return network.transport(identity, check)

    node = Node(transport)
    node.add(ServerConfig(world.checkpoint, **config))
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            await tasks.start(node.run)
            yield node
            node.request_stop(0.0)


async def test_blocks_are_loaded_before_the_swarm_is_joined(world: World, loads: Loads) -> None:
    async with node_of(world, loads.have_begun, blocks=(1, 3)) as node:
        serving = node.servers[0].serving
        assert serving is not None
        assert (serving.blocks, loads.blocks) == ((1, 3), [(1, 3)])


async def test_the_time_of_loading_is_known(world: World, loads: Loads) -> None:
    async with node_of(world, loads.have_begun, blocks=(1, 3)) as node:
        assert node.servers[0].load_s > 0


async def test_what_failed_before_the_swarm_was_joined_is_tried_again(world: World, loads: Loads) -> None:
    loads.failures = [ModelError("a disk that was asleep")]
    async with node_of(world, loads.have_begun, blocks=(1, 3)):
        assert loads.blocks == [(1, 3)] * 2


async def test_what_fails_again_is_told(world: World, loads: Loads) -> None:
    loads.failures = [ModelError("damaged"), ModelError("still damaged")]
    with pytest.RaisesGroup(pytest.RaisesExc(ModelError, match="still damaged"), flatten_subgroups=True):
        async with node_of(world, loads.have_begun, blocks=(1, 3)):
            pass


@pytest.mark.parametrize("choice", [{"num_blocks": 2}, {"num_blocks": "auto"}])
async def test_blocks_that_are_to_be_chosen_wait_for_the_swarm(
    world: World, loads: Loads, choice: dict[str, Any]
) -> None:
    before: list[bool] = []

    async def joining() -> None:
        await asyncio.sleep(0.05)
        before.append(loads.began.is_set())

    async with node_of(world, joining, **choice):
        assert before == [False]


async def test_blocks_of_which_weights_are_elsewhere_wait_for_the_swarm(
    world: World, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "has_blocks", lambda *_: False)
    head_start = HeadStart(ServerConfig(world.checkpoint, blocks=(1, 3)))
    await head_start.run()
    assert (await head_start.take((1, 3)), loads.blocks) == (None, [])


async def test_a_swarm_that_cannot_be_joined_ends_the_loading(world: World, loads: Loads) -> None:
    loads.endless = True

    async def joining() -> None:
        await loads.have_begun()
        raise TransportError("nobody is there")

    with pytest.RaisesGroup(pytest.RaisesExc(TransportError, match="nobody"), flatten_subgroups=True):
        async with node_of(world, joining, blocks=(1, 3)):
            pass


async def test_a_node_that_is_cancelled_ends_the_loading(world: World, loads: Loads) -> None:
    loads.endless = True

    async def never(identity: Identity, check: RecordCheck) -> Transport:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    node = Node(never)
    node.add(ServerConfig(world.checkpoint, blocks=(1, 3)))
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(node.run)
            await loads.have_begun()
            tasks.cancel_scope.cancel()


async def test_a_stage_is_handed_over_once(world: World) -> None:
    head_start = HeadStart(ServerConfig(world.checkpoint, blocks=(1, 3)))
    await head_start.run()
    assert [await head_start.take((1, 3)) is None for _ in range(2)] == [False, True]


async def test_blocks_that_were_given_up_are_not_loaded(world: World, loads: Loads) -> None:
    head_start = HeadStart(ServerConfig(world.checkpoint, blocks=(1, 3)))
    head_start.give_up()
    await head_start.run()
    assert loads.blocks == []


async def test_what_is_given_up_is_let_go(world: World) -> None:
    head_start = HeadStart(ServerConfig(world.checkpoint, blocks=(1, 3)))
    await head_start.run()
    head_start.give_up()
    assert await head_start.take((1, 3)) is None


async def test_other_blocks_are_not_those_that_were_loaded(world: World) -> None:
    head_start = HeadStart(ServerConfig(world.checkpoint, blocks=(1, 3)))
    await head_start.run()
    assert await head_start.take((0, 2)) is None
