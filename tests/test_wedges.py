"""Restarts, equal names and flaps inside a record's lifetime leave neither client nor server stuck.

In virtual time: each sequence is a small swarm of its own, whose machines start, stop, crash and fall silent
at random moments, under a client that goes on with one session all the time. Then they stay up for as long
as a record lives, and everybody must be well.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
import torch
from anyio.abc import TaskGroup

from swarmkit.client.session.chain import ChainSession
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.errors import NoRouteError, SwarmkitError
from swarmkit.local.swarm import over_memory
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.settings import ClientSettings, ServerSettings

from . import virtual_time
from .models.tiny import make_checkpoint

BLOCKS = 2
PLACES = ((0, 2), (0, 1), (1, 2))
"""Of the three machines; no block needs one of them alone."""
LIFETIME_S = 30.0
SERVER = ServerSettings().replace(announce_period_s=10.0, record_lifetime_s=LIFETIME_S, drain_timeout_s=2.0)
CLIENT = ClientSettings().replace(refresh_period_s=10.0, route_timeout_s=5.0, max_ban_s=20.0)
ANSWER_S = 30.0


def pass_s(tokens: int) -> float:
    """Seconds that a forward pass over so many rows x tokens takes."""
    return 0.01


@dataclass
class Outcome:
    """What was wrong at the end of some sequences, each with its seed."""

    stuck: list[str] = field(default_factory=list)
    answers: int = 0
    changes: int = 0


class Machine:
    """A computer with one key, whose server has the same public name as all others."""

    def __init__(
        self, network: MemoryNetwork, checkpoint: Checkpoint, clock: virtual_time.VirtualClock
    ) -> None:
        self.network = network
        self.checkpoint = checkpoint
        self.clock = clock
        self.identity = Identity()
        self.blocks = (0, BLOCKS)
        self.node: Node | None = None
        self._ended = anyio.Event()
        self._ended.set()
        self._hangs = False

    async def start(self, tasks: TaskGroup) -> None:
        """Be up, if it is not."""
        self.resume()
        if self.node is not None:
            return
        self.node = Node(over_memory(self.network), self.identity, clock=self.clock)
        self.node.add(ServerConfig(self.checkpoint, blocks=self.blocks, public_name="same", settings=SERVER))
        self._ended = anyio.Event()
        await tasks.start(self._run, self.node)

    async def _run(self, node: Node, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            await node.run(task_status=task_status)
        finally:
            self.node = None
            self._ended.set()

    async def end(self, how: str) -> None:
        """Stop, or crash, and be gone."""
        self.resume()
        if self.node is not None:
            if how == "stop":
                self.node.request_stop(0.0)
            else:
                self.node.crash()
        await self._ended.wait()

    def hang(self) -> None:
        if self.node is not None and not self._hangs:
            self._hangs = True
            self.network.hang(self.identity.peer_id)

    def resume(self) -> None:
        if self._hangs:
            self._hangs = False
            self.network.resume(self.identity.peer_id)


class Sequence:
    """One swarm and what befalls it."""

    def __init__(self, seed: int, clock: virtual_time.VirtualClock, checkpoint: Checkpoint) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.clock = clock
        self.checkpoint = checkpoint
        self.network = MemoryNetwork(clock=clock.time)
        self.machines = [Machine(self.network, checkpoint, clock) for _ in PLACES]
        for machine, blocks in zip(self.machines, PLACES, strict=True):
            machine.blocks = blocks

    async def run(self, outcome: Outcome) -> None:
        model = ModelRef("tiny", self.checkpoint.fingerprint, BLOCKS, self.checkpoint.hidden_size)
        client, node = (
            SwarmClient(model, CLIENT, clock=self.clock),
            Node(over_memory(self.network), clock=self.clock),
        )
        async with anyio.create_task_group() as tasks:
            await tasks.start(node.run)
            await tasks.start(node.run_client, client)
            for machine in self.machines:
                await machine.start(tasks)
            session = ChainSession(client, 1000)
            async with anyio.create_task_group() as beside:
                beside.start_soon(self._talk, session)
                for _ in range(self.chance.randrange(3, 9)):
                    await self._change(tasks)
                    outcome.changes += 1
                beside.cancel_scope.cancel()
            for machine in self.machines:
                await machine.start(tasks)
            await anyio.sleep(LIFETIME_S + CLIENT.routing.refresh_period_s)
            await self._check(client, session, outcome)
            session.close()
            node.request_stop()
            for machine in self.machines:
                await machine.end("stop")
            tasks.cancel_scope.cancel()

    async def _talk(self, session: ChainSession) -> None:
        """Go on with the session, whatever happens."""
        for _ in range(1000):
            with contextlib.suppress(NoRouteError):
                await session.step(torch.ones(1, 1, self.checkpoint.hidden_size))
            await anyio.sleep(self.chance.uniform(0.5, 4.0))

    async def _change(self, tasks: TaskGroup) -> None:
        """Something happens to a machine, perhaps twice at once, and then time passes, or none does."""
        machine = self.chance.choice(self.machines)
        match self.chance.choice(
            ("stop", "crash", "restart", "crash and restart", "hang", "hang and resume")
        ):
            case "stop" | "crash" as how:
                await machine.end(how)
            case "restart":
                await machine.end("stop")
                await machine.start(tasks)
            case "crash and restart":
                await machine.end("crash")
                await machine.start(tasks)
            case "hang":
                machine.hang()
            case "hang and resume":
                machine.hang()
                await anyio.sleep(self.chance.uniform(0.1, 20.0))
                machine.resume()
        await anyio.sleep(self.chance.choice((0.0, 0.001, self.chance.uniform(0, LIFETIME_S))))
        await self.chance.choice(self.machines).start(tasks)

    async def _check(self, client: SwarmClient, session: ChainSession, outcome: Outcome) -> None:
        """The old session and a new one get their answers, and the client sees what there is."""
        for each in (session, ChainSession(client, 8)):
            try:
                with anyio.fail_after(ANSWER_S):
                    await each.step(torch.ones(1, 1, self.checkpoint.hidden_size))
                outcome.answers += 1
            except (SwarmkitError, TimeoutError) as error:  # noqa: PERF203
                outcome.stuck.append(f"{self.seed}: {type(error).__name__}: {error}")
        seen = {(one.peer_id, one.start, one.stop) for one in client.known.view.servers(self.clock.time())}
        there = {(machine.identity.peer_id, *machine.blocks) for machine in self.machines}
        if seen != there:
            outcome.stuck.append(
                f"{self.seed}: sees {len(seen & there)} of {len(there)}, and {len(seen - there)} more"
            )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    yield Checkpoint.open(make_checkpoint(folder, "llama", num_blocks=BLOCKS))
    torch.set_num_threads(before)


async def run_all(seeds: range, clock: virtual_time.VirtualClock, checkpoint: Checkpoint) -> Outcome:
    outcome = Outcome()
    for seed in seeds:
        await Sequence(seed, clock, checkpoint).run(outcome)
    return outcome


@pytest.mark.parametrize(
    "seeds", [range(8), pytest.param(range(8, 200), marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_random_sequences_leave_nobody_stuck(checkpoint: Checkpoint, seeds: range) -> None:
    stages = virtual_time.SharedStages(checkpoint, pass_s)
    outcome = virtual_time.run(lambda clock: run_all(seeds, clock, checkpoint), stages)
    assert outcome.stuck == []
    assert outcome.answers == 2 * len(seeds)
