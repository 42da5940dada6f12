"""Fifty strangers beside two honest servers: how long a client takes to its first token. In virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import anyio
import pytest
import torch

from swarmkit.client.session.chain import ChainSession
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net.protocol.messages import Step
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.settings import ServerSettings

from .. import virtual_time
from ..models.tiny import make_checkpoint
from ..strangers import LYING, STRANGE, Manner, Stranger, Talk, slow

BLOCKS = 4
HONEST = 2
STRANGERS = 50
FEW = 5
CLIENTS = [FEW, pytest.param(20, marks=pytest.mark.slow)]
"""So many fresh clients tell the median; the more come one after the other, the more of it is work."""
PROMPT, TOKENS = 8, 4
DELAY_S = 0.02
"""One way, between a client and any server."""
SERVER = ServerSettings().replace(record_lifetime_s=1800.0, announce_period_s=600.0)


def pass_s(tokens: int) -> float:
    """Seconds that a forward pass over so many rows x tokens takes."""
    return 0.05 + 0.005 * tokens


@dataclass
class Times:
    """Seconds to the first token of each client's first session, and of each of those after it."""

    first: list[float]
    later: list[list[float]]


class Water:
    """A network with honest servers and strangers, and fresh clients one after the other."""

    def __init__(self, clock: virtual_time.VirtualClock, checkpoint: Checkpoint) -> None:
        self.clock = clock
        self.checkpoint = checkpoint
        self.network = MemoryNetwork(clock=clock.time)
        self.peers: list[str] = []

    @asynccontextmanager
    async def client(self) -> Any:
        """A client that knows nothing but the table."""
        model = ModelRef("tiny", self.checkpoint.fingerprint, BLOCKS, self.checkpoint.hidden_size)
        node = Node(over_memory(self.network), clock=self.clock)
        client = SwarmClient(model, clock=self.clock)
        async with anyio.create_task_group() as tasks:
            await tasks.start(node.run)
            for peer in self.peers:
                self.network.set_link(node.peer_id, peer, delay=DELAY_S)
            await tasks.start(node.run_client, client)
            yield client
            node.request_stop()

    async def answer(self, client: SwarmClient) -> float:
        """Seconds to the first token of a session, which goes on for some more."""
        session = ChainSession(client, PROMPT + TOKENS)
        hidden = torch.randn(1, PROMPT + TOKENS, self.checkpoint.hidden_size)
        began_at = self.clock.now()
        await session.step(hidden[:, :PROMPT])
        seconds = self.clock.now() - began_at
        for at in range(PROMPT, PROMPT + TOKENS):
            await session.step(hidden[:, at : at + 1])
        session.close()
        return seconds

    async def serve(self, tasks: anyio.abc.TaskGroup, servers: int, strangers: Sequence[Stranger]) -> None:
        for _ in range(servers):
            node = Node(over_memory(self.network), clock=self.clock)
            node.add(ServerConfig(self.checkpoint, num_blocks=BLOCKS, settings=SERVER))
            await tasks.start(node.run)
            self.peers.append(node.peer_id)
        for stranger in strangers:
            await stranger.begin()
            self.peers.append(stranger.peer_id)

    async def count(self, manner: Manner, answers: int) -> int:
        """How many of one client's answers a boaster among five servers takes part in."""
        boaster = Stranger(over_memory(self.network), self.checkpoint, manner, clock=self.clock)
        async with anyio.create_task_group() as tasks:
            await self.serve(tasks, 4, [boaster])
            async with self.client() as client:
                for _ in range(answers):
                    await self.answer(client)
                used = [hop.peer_id for step in client.trace if step.tokens > 1 for hop in step.hops]
            tasks.cancel_scope.cancel()
        await boaster.end()
        return used.count(boaster.peer_id)

    async def measure(self, manners: Sequence[Manner], clients: int, sessions: int) -> Times:
        join = over_memory(self.network)
        strangers = [Stranger(join, self.checkpoint, manner, clock=self.clock) for manner in manners]
        times = Times([], [[] for _ in range(sessions - 1)])
        async with anyio.create_task_group() as tasks:
            await self.serve(tasks, HONEST, strangers)
            for _ in range(clients):
                async with self.client() as client:
                    times.first.append(await self.answer(client))
                    for later in times.later:
                        later.append(await self.answer(client))
            tasks.cancel_scope.cancel()
        for stranger in strangers:
            await stranger.end()
        return times


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Measure = Callable[..., Times]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    return Checkpoint.open(make_checkpoint(folder, "llama", num_blocks=BLOCKS))


@pytest.fixture(scope="module")
def measure(checkpoint: Checkpoint) -> Measure:
    def measure(manners: Sequence[Manner], clients: int, sessions: int = 2) -> Times:
        stages = virtual_time.SharedStages(checkpoint, pass_s)
        return virtual_time.run(
            lambda clock: Water(clock, checkpoint).measure(manners, clients, sessions), stages
        )

    return measure


@pytest.fixture(scope="module")
def usual(measure: Measure) -> Times:
    """Without strangers."""
    return measure([], 3)


MANNERS = {name: manner for name, manner in STRANGE.items() if name not in ("lying", "replaying")}
"""Wrong numbers of the right form are no failure that a first token shows."""


@pytest.fixture(scope="module", params=CLIENTS)
def clients(request: pytest.FixtureRequest) -> int:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=MANNERS)
def times(measure: Measure, clients: int, request: pytest.FixtureRequest) -> Times:
    if request.param == "flooding":
        clients = 3 if clients > FEW else 1  # floods are real work, whatever the clock says
    return measure([MANNERS[request.param]] * STRANGERS, clients)


@pytest.fixture(scope="module")
def mixed(measure: Measure, clients: int) -> Times:
    """Strangers of all manners at once."""
    manners = [manner for name, manner in MANNERS.items() if name != "flooding"]
    return measure(list(islice(cycle(manners), STRANGERS)), clients)


def assert_soon(times: Times, usual: Times) -> None:
    assert median(times.first) <= 3 * median(usual.first) + 3.0


def test_the_first_token_comes_soon_beside_fifty_strangers(times: Times, usual: Times) -> None:
    assert_soon(times, usual)


def test_the_second_session_is_as_quick_as_without_strangers(times: Times, usual: Times) -> None:
    assert median(times.later[0]) <= 1.2 * median(usual.later[0])


def test_the_first_token_comes_soon_beside_fifty_strangers_of_all_manners(mixed: Times, usual: Times) -> None:
    assert_soon(mixed, usual)


def test_the_second_session_is_quick_beside_strangers_of_all_manners(mixed: Times, usual: Times) -> None:
    assert median(mixed.later[0]) <= 1.2 * median(usual.later[0])


@pytest.mark.parametrize("name", ["silent", "mute", "slow just under the deadline", "absent"])
def test_honest_servers_that_need_long_for_a_token_are_found_soon_too(
    checkpoint: Checkpoint, name: str
) -> None:
    stages = virtual_time.SharedStages(checkpoint, lambda tokens: 6.0)  # a busy machine, or a large model

    def first(manners: Sequence[Manner]) -> float:
        return median(
            virtual_time.run(lambda clock: Water(clock, checkpoint).measure(manners, 2, 1), stages).first
        )

    assert first([MANNERS[name]] * STRANGERS) <= 3 * first([]) + 3.0


def test_servers_that_are_slow_but_not_too_slow_are_left_after_some_sessions(
    measure: Measure, clients: int, usual: Times
) -> None:
    times = measure([slow(0.7)] * STRANGERS, clients, sessions=8)
    assert median(times.first) > 1.0  # nothing better was known yet
    assert median(times.later[-1]) <= 1.2 * median(usual.later[0])


class AsFastAsOthers(Manner):
    """Wrong numbers, which take as long as the right ones take elsewhere."""

    async def at_step(self, talk: Talk, received: IncomingMessage, step: Step) -> None:
        await anyio.sleep(pass_s(step.hidden.shape[1]))
        await LYING.at_step(talk, received, step)


@pytest.mark.parametrize("manner", [AsFastAsOthers(), slow(0.3)], ids=["as fast as others", "slow"])
def test_a_liar_of_five_that_claims_everything_draws_no_more_than_its_share(
    checkpoint: Checkpoint, manner: Manner
) -> None:
    stages = virtual_time.SharedStages(checkpoint, pass_s)
    drawn = virtual_time.run(lambda clock: Water(clock, checkpoint).count(manner, 12), stages)
    assert drawn <= 12 / 5
