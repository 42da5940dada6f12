"""A virtual swarm: servers that come and go, the table of their announcements, and clients."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from swarmkit.net.registry.records import ServerState
from swarmkit.net.registry.swarm_map import SwarmMap
from swarmkit.placement.description import Machine, blocks_that_fit
from swarmkit.placement.ranges import uncovered
from swarmkit.placement.supply import greatest_rate, greatest_rate_of_any
from swarmkit.settings import ClientSettings
from swarmkit.simulation.client import Router, SimulatedAnswer, SimulatedClient, SwarmRouter
from swarmkit.simulation.demand import SimulatedRequest
from swarmkit.simulation.distances import Distances
from swarmkit.simulation.hardware import SimulatedModel
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.rules import PlacementRule
from swarmkit.simulation.server import Announced, SimulatedServer
from swarmkit.simulation.virtual_time import VirtualClock


@dataclass
class Sample:
    """The swarm at one moment.

    Attributes:
        servers: that exist, whether they serve already or not.
        rate: tokens per second that those which serve can carry.
        bound: that no placement of those which exist could beat.
        missing: blocks without a server.
    """

    at_s: float
    servers: int
    rate: float
    bound: float
    missing: int


@dataclass
class SwarmHistory:
    """What happened in a simulation."""

    answers: list[SimulatedAnswer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """When some block had no server, from and until; the latest may still be open."""
    moves: int = 0


class SimulatedSwarm:
    """The network of one model."""

    def __init__(
        self,
        model: SimulatedModel,
        distances: Distances,
        rule: PlacementRule,
        assumptions: SwarmAssumptions,
        clock: VirtualClock,
        tasks: TaskGroup,
        *,
        seed: int = 0,
        pass_s: Callable[[Machine, int, float], float] | None = None,
    ) -> None:
        self.model, self.distances, self.rule, self.assumptions = model, distances, rule, assumptions
        self.clock = clock
        self.history = SwarmHistory()
        self.servers: dict[str, SimulatedServer] = {}
        """Those that exist, by name."""
        self._tasks = tasks
        self._seed, self._pass_s = seed, pass_s
        self._chance = random.Random(f"{seed} spread")
        self._table: dict[str, Announced] = {}
        self._serving: dict[str, tuple[ServerState, tuple[int, int]]] = {}
        self._was_covered = False
        self._uncovered_since: float | None = None
        self._clients = 0

    # ------------------------------------------------------------------ servers

    def join(self, machine: Machine, place: int) -> SimulatedServer:
        """A machine comes."""
        server = SimulatedServer(
            machine,
            place,
            self.model,
            self.rule,
            self.assumptions,
            self.clock,
            random.Random(f"{self._seed} {machine.name}"),
            lambda: self.announced(machine.name),
            self._announce,
            self.servers.__contains__,
            pass_s=self._pass_s,
        )
        self.servers[machine.name] = server
        self._tasks.start_soon(server.live)
        return server

    def leave(self, name: str) -> None:
        """A machine goes: at once, or after it has told so."""
        if self.assumptions.notice_s is None:
            self._remove(name)
        else:
            self._tasks.start_soon(self._leave_in_order, name)

    async def _leave_in_order(self, name: str) -> None:
        self.servers[name].leave_soon()
        await anyio.sleep(self.assumptions.notice_s or 0.0)
        self._remove(name)

    def _remove(self, name: str) -> None:
        server = self.servers.pop(name, None)
        if server is not None:
            self.history.moves += server.moves
            server.end()
            self._note_cover()

    def _announce(self, server: SimulatedServer, state: ServerState) -> None:
        name = server.machine.name
        if self.servers.get(name) is not server:
            return
        announced = server.announcement(state), server.served
        delay_s = self._chance.uniform(0, self.assumptions.spread_s)
        asyncio.get_running_loop().call_later(delay_s, self._store, announced)
        if self._serving.get(name) != (state, server.span):
            self._serving[name] = state, server.span
            self._note_cover()

    def _store(self, announced: Announced) -> None:
        record, _ = announced
        before = self._table.get(record.peer_id)
        if before is None or before[0].sequence < record.sequence:
            self._table[record.peer_id] = announced

    def announced(self, but: str = "") -> list[Announced]:
        """What the table says about those that serve or are about to."""
        now = self.clock.time()
        return [
            (record, served)
            for name, (record, served) in self._table.items()
            if name != but and record.expires_at > now and record.state in ("joining", "online")
        ]

    def look_up(self) -> SwarmMap:
        """What clients find in the table."""
        now = self.clock.time()
        for name in [name for name, (record, _) in self._table.items() if record.expires_at <= now]:
            del self._table[name]
        return SwarmMap({record.service_id: record for record, _ in self._table.values()})

    # ------------------------------------------------------------------ cover

    def online(self) -> list[SimulatedServer]:
        return [server for server in self.servers.values() if server.state == "online"]

    def missing(self) -> int:
        """Blocks that no server serves now."""
        gaps = uncovered(0, self.model.size.num_blocks, [server.span for server in self.online()])
        return sum(stop - start for start, stop in gaps)

    def is_covered(self) -> bool:
        return not self.missing()

    def _note_cover(self) -> None:
        now, covered = self.clock.now(), self.is_covered()
        if covered and self._uncovered_since is not None:
            self.history.gaps.append((self._uncovered_since, now))
            self._uncovered_since = None
        elif not covered and self._was_covered:
            self._uncovered_since = now
        self._was_covered = covered

    def sample(self) -> Sample:
        """The swarm as it is now."""
        blocks = self.model.size.num_blocks
        serving = [server.served for server in self.online()]
        machines = [
            (most, machine.rate(most) * most)
            for server in self.servers.values()
            if (most := blocks_that_fit(machine := server.machine, self.model.size))
        ]
        return Sample(
            self.clock.now(),
            len(self.servers),
            greatest_rate(blocks, serving) if serving else 0.0,
            greatest_rate_of_any(blocks, machines),
            self.missing(),
        )

    # ------------------------------------------------------------------ clients

    def client(
        self, place: int, router: Router | None = None, settings: ClientSettings | None = None
    ) -> SimulatedClient:
        """A client of the swarm, which runs until the swarm ends."""
        self._clients += 1
        if router is None:
            name = f"client-{self._seed}-{self._clients}"
            router = SwarmRouter(self.model, self.look_up, self.clock, name, settings)
            self._tasks.start_soon(router.run)
        return SimulatedClient(
            place,
            router,
            self.model,
            self.assumptions,
            self.distances,
            self.clock,
            self.servers.get,
            self.is_covered,
        )

    async def answer_all(
        self,
        requests: Sequence[SimulatedRequest],
        clients: Sequence[SimulatedClient],
        on_answer: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Have every request answered by the clients in turns, each when it comes."""

        async def one(client: SimulatedClient, request: SimulatedRequest) -> None:
            self.history.answers.append(await client.answer(request))
            on_answer(len(self.history.answers), len(requests))

        start = self.clock.now()
        async with anyio.create_task_group() as tasks:
            for number, request in enumerate(requests):
                await anyio.sleep(max(0.0, start + request.at_s - self.clock.now()))
                tasks.start_soon(one, clients[number % len(clients)], request)

    async def sample_forever(self, period_s: float) -> None:
        """Note how the swarm is, every period."""
        while True:
            await anyio.sleep(period_s)
            self.history.samples.append(self.sample())

    def finish(self) -> SwarmHistory:
        """What has happened, moves of those that still serve included."""
        self.history.moves += sum(server.moves for server in self.servers.values())
        return self.history
