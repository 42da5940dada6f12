"""Servers that move by themselves, in virtual time: blocks find servers again, and no session is lost."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from anyio.abc import TaskGroup

from swarmkit.client.session.chain import ChainSession
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.errors import TransportError
from swarmkit.events import DrainStarted, MoveStarted
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.part import PartTransport
from swarmkit.net.transport.seam import RecordCheck, Transport
from swarmkit.node.node import Node
from swarmkit.placement.intentions import OVERDUE_S
from swarmkit.server.config import ServerConfig
from swarmkit.server.model_server import ModelServer
from swarmkit.settings import ClientSettings, ServerSettings

from .. import virtual_time
from ..models.tiny import make_checkpoint

BLOCKS = 6
PERIOD_S = 20.0
TOKENS = 120
"""Of a session, one a second: so long that servers move meanwhile."""
SERVER = ServerSettings().replace(moves=True, move_period_s=PERIOD_S, drain_timeout_s=5.0, throughput=10.0)
CLIENT = ClientSettings().replace(route_timeout_s=300.0)


def pass_s(tokens: int) -> float:
    """Seconds that a forward pass over so many rows x tokens takes."""
    return 0.01


class LateTransport(PartTransport):
    """What its peer announces is known to others some time later."""

    def __init__(self, transport: Transport, tasks: TaskGroup, delay_s: Callable[[], float]) -> None:
        super().__init__(transport)
        self._tasks, self._delay_s = tasks, delay_s

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        listed = list(records)
        self._tasks.start_soon(self._store, listed, expires_at, service)
        return len(listed)

    async def _store(self, records: list[tuple[str, bytes]], expires_at: float, service: int) -> None:
        await anyio.sleep(self._delay_s())
        with suppress(TransportError):
            await super().store(records, expires_at, service)


@dataclass
class Peer:
    """A machine with one server."""

    node: Node
    server: ModelServer


@dataclass
class Colony:
    """Servers on an in-memory network, and a client with sessions over them."""

    clock: virtual_time.VirtualClock
    checkpoint: Checkpoint
    tasks: TaskGroup
    peers: list[Peer] = field(default_factory=list)
    wrong: int = 0
    steps: int = 0
    spread_s: float = 0.0
    """Within which an announcement is known to all."""

    def __post_init__(self) -> None:
        self.chance = random.Random(len(self.peers))
        self.network = MemoryNetwork(clock=self.clock.time)
        self.whole = Stage.load(self.checkpoint, 0, BLOCKS)

    async def add(self, count: int, **settings: Any) -> Peer:
        """One more server of `count` blocks, where it is needed most."""
        node = Node(self._transport, clock=self.clock)
        config = ServerConfig(self.checkpoint, num_blocks=count, settings=SERVER.replace(**settings))
        peer = Peer(node, node.add(config))
        await self.tasks.start(node.run)
        self.peers.append(peer)
        return peer

    async def _transport(self, identity: Identity, check: RecordCheck) -> Transport:
        transport = await over_memory(self.network)(identity, check)
        if not self.spread_s:
            return transport
        return LateTransport(transport, self.tasks, lambda: self.chance.uniform(0, self.spread_s))

    async def client(self) -> SwarmClient:
        model = ModelRef("tiny", self.checkpoint.fingerprint, BLOCKS, self.checkpoint.hidden_size)
        node, client = (
            Node(over_memory(self.network), clock=self.clock),
            SwarmClient(model, CLIENT, clock=self.clock),
        )
        await self.tasks.start(node.run)
        await self.tasks.start(node.run_client, client)
        return client

    async def talk(self, client: SwarmClient, tokens: int, seed: int) -> None:
        """A session of so many steps, a second apart, each of which must be as the whole model has it."""
        hidden = torch.randn(
            1, tokens, self.checkpoint.hidden_size, generator=torch.Generator().manual_seed(seed)
        )
        session, found = ChainSession(client, tokens), []
        for at in range(tokens):
            found.append(await session.step(hidden[:, at : at + 1]))
            self.steps += 1
            await anyio.sleep(1.0)
        session.close()
        wanted = self.whole.forward(hidden, self.whole.new_cache(0, BLOCKS))
        self.wrong += not torch.allclose(wanted, torch.cat(found, dim=1), rtol=0, atol=1e-4)

    @property
    def holders(self) -> list[int]:
        """How many servers of this moment hold each block."""
        spans = [peer.server.blocks for peer in self.peers]
        return [sum(low <= block < high for low, high in spans) for block in range(BLOCKS)]

    def events(self, kind: type) -> list[Any]:
        return [
            event for peer in self.peers for event in peer.server.events.history if isinstance(event, kind)
        ]

    async def lose(self, *peers: Peer, crash: bool = True) -> None:
        for peer in peers:
            self.peers.remove(peer)
            if crash:
                peer.node.crash()
            else:
                peer.node.request_stop()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    return Checkpoint.open(make_checkpoint(folder, "llama", num_blocks=BLOCKS))


def live(
    checkpoint: Checkpoint,
    story: Callable[[Colony], Awaitable[None]],
    seed: int = 0,
    *,
    spread_s: float = 0.0,
) -> Colony:
    """Let a story happen to an empty colony; returns what it has become."""

    async def main(clock: virtual_time.VirtualClock) -> Colony:
        async with anyio.create_task_group() as tasks:
            colony = Colony(clock, checkpoint, tasks, spread_s=spread_s)
            await story(colony)
            tasks.cancel_scope.cancel()
        return colony

    return virtual_time.run(main, virtual_time.SharedStages(checkpoint, pass_s), seed)


async def five_of_three(colony: Colony) -> None:
    """Three servers of the first half, two of the second."""
    for _ in range(5):
        await colony.add(3)


async def two_sessions(colony: Colony, tasks: TaskGroup) -> None:
    for number in range(2):
        tasks.start_soon(colony.talk, await colony.client(), TOKENS, number)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_that_lost_all_their_servers_have_one_again(checkpoint: Checkpoint, seed: int) -> None:
    async def story(colony: Colony) -> None:
        await five_of_three(colony)
        await colony.lose(*(peer for peer in list(colony.peers) if peer.server.blocks == (3, 6)))
        await anyio.sleep(30.0 + 2 * PERIOD_S)  # the records of the dead, and two looks

    colony = live(checkpoint, story, seed)
    assert min(colony.holders) >= 1


def test_the_place_of_crashed_servers_is_taken_before_their_announcements_end(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        for _ in range(5):
            await colony.add(3, record_lifetime_s=3000.0)
        await colony.lose(*(peer for peer in list(colony.peers) if peer.server.blocks == (3, 6)))
        await anyio.sleep(3 * PERIOD_S)

    colony = live(checkpoint, story)
    assert min(colony.holders) >= 1


def test_sessions_go_on_when_blocks_have_a_server_again(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        await five_of_three(colony)
        async with anyio.create_task_group() as talks:
            await two_sessions(colony, talks)
            await anyio.sleep(20.0)
            await colony.lose(*(peer for peer in list(colony.peers) if peer.server.blocks == (3, 6)))

    colony = live(checkpoint, story)
    assert (colony.steps, colony.wrong) == (2 * TOKENS, 0)


def test_a_server_moves_where_its_work_is_scarce(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        await five_of_three(colony)
        await colony.lose(next(peer for peer in colony.peers if peer.server.blocks == (3, 6)), crash=False)
        await anyio.sleep(6 * PERIOD_S)

    colony = live(checkpoint, story)
    assert colony.holders == [2] * BLOCKS


def test_a_move_says_why_and_from_where(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        await five_of_three(colony)
        await colony.lose(next(peer for peer in colony.peers if peer.server.blocks == (3, 6)), crash=False)
        await anyio.sleep(6 * PERIOD_S)

    (moved,) = live(checkpoint, story).events(MoveStarted)
    assert (moved.from_start, moved.from_stop, moved.start, moved.stop) == (0, 3, 3, 6)
    assert moved.reason == "the weakest block carries 2.00 times as much then"


def test_a_move_under_load_drops_nothing(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        await five_of_three(colony)
        async with anyio.create_task_group() as talks:
            await two_sessions(colony, talks)
            await anyio.sleep(20.0)
            await colony.lose(
                next(peer for peer in colony.peers if peer.server.blocks == (3, 6)), crash=False
            )

    colony = live(checkpoint, story)
    assert (colony.steps, colony.wrong) == (2 * TOKENS, 0)
    assert colony.events(DrainStarted)


def test_servers_of_a_balanced_swarm_stay(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        for _ in range(6):
            await colony.add(2)
        await anyio.sleep(30 * PERIOD_S)

    assert live(checkpoint, story).events(MoveStarted) == []


def test_uneven_servers_settle(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        chance = random.Random(1)
        for _ in range(8):
            await colony.add(chance.randint(1, 4), throughput=chance.uniform(3.0, 30.0))
        await anyio.sleep(20 * PERIOD_S)
        early = len(colony.events(MoveStarted))
        await anyio.sleep(30 * PERIOD_S)
        assert len(colony.events(MoveStarted)) == early

    live(checkpoint, story)


def test_a_server_whose_blocks_were_named_stays(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        node = Node(over_memory(colony.network), clock=colony.clock)
        server = node.add(ServerConfig(colony.checkpoint, blocks=(0, 3), settings=SERVER))
        await colony.tasks.start(node.run)
        colony.peers.append(Peer(node, server))
        await colony.add(3)
        await colony.lose(colony.peers[-1])
        await anyio.sleep(10 * PERIOD_S)

    (peer,) = live(checkpoint, story).peers
    assert peer.server.blocks == (0, 3)


def test_the_only_server_of_its_blocks_stays_though_others_lack_one(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        await colony.add(3)
        await anyio.sleep(10 * PERIOD_S)

    assert live(checkpoint, story).events(MoveStarted) == []


# at the same moment


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_servers_that_move_at_the_same_moment_leave_no_block_without_a_server(
    checkpoint: Checkpoint, seed: int
) -> None:
    """All that are left hold the first half; each looks every few seconds at where it is needed more."""
    hurry = {"move_period_s": 12.0, "move_notice_s": 2.0}

    async def story(colony: Colony) -> None:
        for _ in range(8):
            await colony.add(3, **hurry)
            await anyio.sleep(colony.spread_s)
        await colony.lose(*(peer for peer in list(colony.peers) if peer.server.blocks == (3, 6)))
        for _ in range(4 * 60):
            await anyio.sleep(0.25)
            fewest.append(min(colony.holders[:3]))

    fewest: list[int] = []
    colony = live(checkpoint, story, seed, spread_s=2.0)
    assert min(fewest) >= 1
    assert min(colony.holders) >= 1


async def announce_mover(colony: Colony, blocks: tuple[int, int], to: tuple[int, int]) -> None:
    """A stranger that says for ever that it is about to move, and does nothing."""
    transport = colony.network.transport()
    said = Announcement(
        peer_id=transport.peer_id,
        fingerprint=colony.checkpoint.fingerprint,
        model="tiny",
        num_blocks=BLOCKS,
        start=blocks[0],
        stop=blocks[1],
        state="online",
        throughput=10.0,
        free_cache_tokens=1,
        dtype="float32",
        addresses=(),
        moving_to=to,
        sequence=1,
        expires_at=colony.clock.time() + 3000.0,
    )
    await Registry(transport, colony.clock.time).announce(said)


def test_nobody_relies_on_a_stranger_that_means_to_leave(checkpoint: Checkpoint) -> None:
    async def story(colony: Colony) -> None:
        await colony.add(3)
        await announce_mover(colony, (0, 3), (0, 2))
        await anyio.sleep(4 * PERIOD_S)

    colony = live(checkpoint, story)
    assert colony.holders[:3] == [1, 1, 1]
    assert colony.events(MoveStarted) == []


@pytest.mark.slow
def test_a_stranger_that_always_means_to_come_keeps_others_away_for_a_while_only(
    checkpoint: Checkpoint,
) -> None:
    async def story(colony: Colony) -> None:
        await colony.add(3)
        await announce_mover(colony, (0, 3), (3, 6))
        await colony.add(3)
        assert colony.holders == [2, 2, 2, 0, 0, 0]
        await anyio.sleep(OVERDUE_S + 2 * PERIOD_S)

    colony = live(checkpoint, story)
    assert min(colony.holders) == 1
