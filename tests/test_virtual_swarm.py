"""Life in a busy swarm in virtual time: 200 servers come, die and leave under 50 sessions that decode.

The beginning of an hour is lived through with every change, and the whole hour among the slow tests.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

from swarmkit.client.session.chain import ChainSession
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.settings import ClientSettings, ServerSettings

from . import virtual_time
from .models.tiny import make_checkpoint

SERVERS = 200
CLIENTS = 5
SESSIONS = 10
"""Of each client."""
HOUR_S = 3600.0
BEGINNING_S = 900.0
MOST = 1000
"""Lives of a server and answers of a session; an hour holds fewer."""
BLOCKS = 4

SERVER = ServerSettings().replace(
    announce_period_s=120.0, record_lifetime_s=300.0, drain_timeout_s=20.0, measure_period_s=3600.0
)
CLIENT = ClientSettings().replace(refresh_period_s=120.0, route_timeout_s=300.0)


def pass_s(tokens: int) -> float:
    """Seconds that a forward pass over so many rows x tokens takes."""
    return 0.004 + 0.0005 * tokens


@dataclass
class Hour:
    """What happened in an hour, or in the beginning of one."""

    duration_s: float
    lines: list[str] = field(default_factory=list)
    """Every event and every output, in order."""
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that differ from those of the whole model in one place."""

    def note(self, kind: str, **what: Any) -> None:
        self.kinds[kind] += 1
        self.lines.append(json.dumps({"kind": kind, **what}, sort_keys=True))


class Swarm:
    """The network, and the lives of all that are in it."""

    def __init__(
        self, clock: virtual_time.VirtualClock, checkpoint: Checkpoint, whole: Stage, seconds: float
    ) -> None:
        """Args: seconds: how long it lives."""
        self.clock = clock
        self.checkpoint = checkpoint
        self.whole = whole
        self.network = MemoryNetwork(clock=clock.time)
        self.hour = Hour(seconds)

    async def live(self) -> Hour:
        async with anyio.create_task_group() as tasks:
            for number in range(SERVERS):
                tasks.start_soon(self._serve, random.Random(f"server {number}"), number)
            await anyio.sleep(60.0)
            for number in range(CLIENTS):
                await tasks.start(self._use, number)
            await anyio.sleep(self.hour.duration_s - self.clock.now())
            tasks.cancel_scope.cancel()
        return self.hour

    async def _serve(self, chance: random.Random, number: int) -> None:
        """One machine: its server joins, is there for a while, and stops, crashes or hangs; then again."""
        await anyio.sleep(chance.uniform(0, 50.0))
        for _ in range(MOST):
            node = Node(over_memory(self.network), clock=self.clock)
            server = node.add(
                ServerConfig(
                    self.checkpoint,
                    num_blocks=chance.choice((1, 2, 2, BLOCKS)),
                    public_name=f"server-{number}",
                    settings=SERVER,
                )
            )
            events = server.events.subscribe()
            async with anyio.create_task_group() as tasks:
                await tasks.start(node.run)
                await anyio.sleep(chance.expovariate(1 / 1500))
                match chance.choice(("stop", "crash", "hang")):
                    case "stop":
                        node.request_stop()
                    case "crash":
                        node.crash()
                    case "hang":
                        self.network.hang(node.peer_id)
                        await anyio.sleep(chance.uniform(5.0, 60.0))
                        node.crash()
            for event in events.pending():
                self.hour.note(type(event).__name__, **event.to_json())
            await anyio.sleep(chance.expovariate(1 / 300))

    async def _use(self, number: int, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """One client and its sessions."""
        model = ModelRef("tiny", self.checkpoint.fingerprint, BLOCKS, self.checkpoint.hidden_size)
        node = Node(over_memory(self.network), clock=self.clock)
        client = SwarmClient(model, CLIENT, clock=self.clock)
        async with anyio.create_task_group() as tasks:
            await tasks.start(node.run)
            await tasks.start(node.run_client, client)
            tasks.start_soon(self._follow, client)
            for session in range(SESSIONS):
                tasks.start_soon(self._talk, client, random.Random(f"session {number} {session}"))
            task_status.started()

    async def _follow(self, client: SwarmClient) -> None:
        async for event in client.events.subscribe(100_000):
            self.hour.note(type(event).__name__, **event.to_json())

    async def _talk(self, client: SwarmClient, chance: random.Random) -> None:
        """Answer after answer, each in a session of its own, with pauses as a reader makes them."""
        for _ in range(MOST):
            await anyio.sleep(chance.expovariate(1 / 400))
            prompt, tokens = chance.randrange(4, 24), chance.randrange(4, 10)
            hidden = noise(prompt + tokens, self.checkpoint.hidden_size, chance)
            session = ChainSession(client, prompt + tokens)
            outputs = []
            for low, high in [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + tokens))]:
                outputs.append(await session.step(hidden[:, low:high]))
                await anyio.sleep(chance.expovariate(1 / 30))
            session.close()
            self._compare(hidden, torch.cat(outputs, dim=1), str(session.owner))

    def _compare(self, hidden: Tensor, found: Tensor, owner: str) -> None:
        wanted = self.whole.forward(hidden, self.whole.new_cache(0, BLOCKS))
        if not torch.allclose(wanted, found, rtol=0, atol=1e-4):
            self.hour.wrong.append(owner)
        digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
        self.hour.note("answer", owner=owner, at=self.clock.now(), digest=digest)


def noise(tokens: int, width: int, chance: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    return torch.randn(1, tokens, width, generator=generator)


@pytest.fixture(scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and sums must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    return Checkpoint.open(make_checkpoint(folder, "llama", num_blocks=BLOCKS))


def live_through(checkpoint: Checkpoint, seconds: float) -> Hour:
    whole = Stage.load(checkpoint, 0, BLOCKS)
    stages = virtual_time.SharedStages(checkpoint, pass_s)
    return virtual_time.run(lambda clock: Swarm(clock, checkpoint, whole, seconds).live(), stages)


@pytest.fixture(scope="module", params=[BEGINNING_S, pytest.param(HOUR_S, marks=pytest.mark.slow)])
def hour(checkpoint: Checkpoint, _one_thread: None, request: pytest.FixtureRequest) -> Hour:
    return live_through(checkpoint, request.param)


@pytest.mark.timeout(600)
def test_every_answer_is_that_of_the_whole_model_whatever_became_of_its_servers(hour: Hour) -> None:
    assert hour.kinds["answer"] > hour.duration_s / 36
    assert hour.wrong == []


@pytest.mark.parametrize("kind", ["ServerJoined", "DrainStarted", "PeerLost", "PeerReplaced", "StepFinished"])
def test_the_hour_was_busy(hour: Hour, kind: str) -> None:
    assert hour.kinds[kind] > hour.duration_s / 72


@pytest.mark.timeout(600)
def test_the_same_hour_passes_in_the_same_way_to_the_byte(hour: Hour, checkpoint: Checkpoint) -> None:
    """Of a beginning, its first half is lived through again, and of an hour, all."""
    seconds = hour.duration_s if hour.duration_s == HOUR_S else hour.duration_s / 2
    again = live_through(checkpoint, seconds).lines
    assert len(again) > seconds / 10
    assert again == hour.lines[: len(again)]
