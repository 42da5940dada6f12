"""A virtual server: its life, its cache and its device."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import anyio

from swarmkit.net.registry.records import Announcement, ServerState
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.receive_budget import ReceiveBudget
from swarmkit.placement.description import Machine, Served, served_by
from swarmkit.placement.intentions import AnnouncedRun, Span, expected
from swarmkit.placement.move_protocol import is_turn, move_if_needed
from swarmkit.placement.signs_of_life import GoneServers, gone, to_ask
from swarmkit.server.cache.kv_budget import CacheFullError, CacheLease, KVBudget
from swarmkit.server.relocation import announced_runs
from swarmkit.server.sessions.admission import AdmissionControl
from swarmkit.settings import ServerSettings
from swarmkit.simulation.hardware import SimulatedModel
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.rules import PlacementRule
from swarmkit.simulation.virtual_time import VirtualClock

CHUNK_TOKENS = 512
"""A prompt runs in pieces of so many tokens where steps run together."""
FINGERPRINT = "0" * 64

Announced = tuple[Announcement, Served]
"""A server's record, and what it says about its speed and its caches."""


class SimulatedPlace:
    """One session's place at a server: its lease, and what it is told."""

    def __init__(self, lease: CacheLease, opened_at: float, told: Callable[[], None]) -> None:
        self.lease = lease
        self.opened_at = opened_at
        self.told = told
        """Called when the server says that it goes, and when it has gone."""
        self.is_over = False
        """Whether the server serves the session no longer."""


class SimulatedServer:
    """Joins, serves, moves and goes. All that others know of it is in its announcement."""

    def __init__(
        self,
        machine: Machine,
        place: int,
        model: SimulatedModel,
        rule: PlacementRule,
        assumptions: SwarmAssumptions,
        clock: VirtualClock,
        chance: random.Random,
        others: Callable[[], list[Announced]],
        tell: Callable[[SimulatedServer, ServerState], None],
        lives: Callable[[str], bool],
        *,
        pass_s: Callable[[Machine, int, float], float] | None = None,
    ) -> None:
        """Args:
        place: where it is, in the swarm's distances.
        others: what the other servers announce, as this one sees it now.
        tell: announces this server in a state.
        lives: whether a server of that name answers.
        pass_s: seconds of a forward pass at a machine through so many blocks with so many tokens.
        """
        self.machine, self.place = machine, place
        self.span = (0, 0)
        self.state: ServerState | None = None
        """None before it has chosen blocks, and when it is gone."""
        self.moving_to: Span | None = None
        """Where it means to go, and says so."""
        self.moves = 0
        self.sequence = 0
        self.places: set[SimulatedPlace] = set()
        self._model, self._rule, self._assumptions = model, rule, assumptions
        self._clock, self._chance = clock, chance
        self._others, self._tell, self._lives = others, tell, lives
        self._pass_s = pass_s or _pass_s
        self._known_gone = GoneServers()
        self._leaves = False
        self._gone = asyncio.Event()
        self._budget = KVBudget(0)
        engine = cast(Any, SimpleNamespace(clock=clock))
        self._admission = AdmissionControl(ServerSettings(), engine, ReceiveBudget(2**40))
        self._waiting: list[_QueuedWork] = []
        self._work_comes = asyncio.Event()

    # ------------------------------------------------------------------ what others know

    @property
    def served(self) -> Served:
        """What it announces about its speed."""
        return served_by(self.machine, *self.span, self._model.size)

    def announcement(self, state: ServerState) -> Announcement:
        """Its record."""
        self.sequence += 1
        start, stop = self.span
        token_bytes = max(1.0, (stop - start) * self._model.size.token_bytes)
        return Announcement(
            peer_id=self.machine.name,
            fingerprint=FINGERPRINT,
            model=self._model.name,
            num_blocks=self._model.size.num_blocks,
            start=start,
            stop=stop,
            state=state,
            throughput=1 / ((stop - start) * self.machine.decode_s),
            free_cache_tokens=int(self._budget.free_bytes / token_bytes),
            dtype="float16",
            addresses=(),
            public_name=self.machine.name,
            moving_to=self.moving_to,
            sequence=self.sequence,
            expires_at=self._clock.time() + self._assumptions.record_lifetime_s,
        )

    # ------------------------------------------------------------------ life

    async def live(self) -> None:
        """Choose blocks, load them, serve, and look for a better place now and then, until told to go."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._serve)
            await self._gone.wait()
            tasks.cancel_scope.cancel()

    def end(self) -> None:
        """End at once."""
        self._gone.set()
        self.state = None
        self._end_sessions()

    async def _serve(self) -> None:
        await self._take(self._rule.choose(self.machine, self._expected(self._others(), None)))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._announce_forever)
            if self._assumptions.batching:
                tasks.start_soon(self._compute_forever)
            while True:
                await anyio.sleep(self._chance.uniform(0.5, 1.5) * self._assumptions.look_period_s)
                await move_if_needed(self, self._notice)

    async def _notice(self) -> None:
        await anyio.sleep(self._assumptions.move_notice_s)

    async def tell(self, blocks: Span | None) -> None:
        """Say where it means to go."""
        if self.moving_to != blocks:
            self.moving_to = blocks
            if self.state is not None:
                self._tell(self, self.state)

    async def go(self, blocks: Span) -> None:
        """Move as soon as it may leave its blocks, of which it serves none while it loads others."""

        async def runs() -> list[AnnouncedRun]:
            return announced_runs([record for record, _ in self._others()])

        may_go = await is_turn(
            self.machine.name,
            self.span,
            None,
            runs,
            self._notice,
            wanted=blocks,
            num_blocks=self._model.size.num_blocks,
        )
        if may_go and self.state == "online":
            await self.move(blocks)

    def _expected(self, others: Sequence[Announced], before: Collection[str] | None) -> list[Served]:
        """The others with the blocks that they are about to serve."""
        runs = announced_runs([record for record, _ in others])
        places = expected(self.machine.name, runs, before)
        return [_at(others[number][1], span) for number, span in places]

    async def look(self, before: Collection[str] | None) -> tuple[Span | None, Collection[str]]:
        """Where it is needed more, among the others that are not known to be gone; and who means to move."""
        if self.state != "online":
            return None, ()
        announced = self._others()
        movers = {record.peer_id for record, _ in announced if record.moving_to}
        others = self._expected(announced, before)
        sequences = {record.peer_id: record.sequence for record, _ in announced}
        names = [(one.name, sequences[one.name]) for one in others]
        known = self._known_gone.among(names)
        asked, silent = set(known), set(known)
        while turn := to_ask(self._model.size.num_blocks, others, asked, silent, self._chance.random):
            unanswered = {number for number in turn if not self._lives(others[number].name)}
            asked.update(turn)
            silent |= unanswered
            if unanswered:
                await anyio.sleep(self._assumptions.silence_s)
        away = gone(asked - known, silent - known)
        self._known_gone.note(names[number] for number in away)
        staying = [one for number, one in enumerate(others) if number not in away and number not in known]
        found = self._rule.better(self.machine, self.served, staying, self._load_s(self.span))
        return None if found == self.span or self.state != "online" else found, movers

    async def move(self, blocks: Span) -> None:
        """Serve other blocks: sessions are told to leave, and then the blocks are loaded."""
        self.moves += 1
        self.moving_to = None
        self._set("leaving")
        self._end_sessions()
        await self._take(blocks)

    async def _take(self, blocks: tuple[int, int]) -> None:
        self.span = blocks
        self._set("joining")
        await anyio.sleep(self._load_s(blocks))
        if self._leaves:
            return
        weights = (blocks[1] - blocks[0]) * self._model.size.block_bytes
        left = self.machine.memory_bytes - weights
        most = self._assumptions.cache_tokens * (blocks[1] - blocks[0]) * self._model.size.token_bytes
        self._budget.set_capacity(max(0, int(min(left, most))))
        self._set("online")

    def _load_s(self, blocks: tuple[int, int]) -> float:
        return (blocks[1] - blocks[0]) * self._model.size.block_bytes / self._assumptions.load_bytes_per_s

    def _set(self, state: ServerState) -> None:
        self.state = state
        self._tell(self, state)

    async def _announce_forever(self) -> None:
        while True:
            await anyio.sleep(self._assumptions.announce_period_s)
            if self.state is not None:
                self._tell(self, self.state)

    def leave_soon(self) -> None:
        """Tell that it goes: no new sessions; the old ones look for others, and stay until there are some."""
        self._leaves = True
        if self.state is not None:
            self._set("leaving")
            for place in list(self.places):
                place.told()

    def _end_sessions(self) -> None:
        for place in list(self.places):
            self.close(place)
            place.is_over = True
            place.told()
        for work in self._waiting:
            work.done.set()
        self._waiting.clear()

    # ------------------------------------------------------------------ sessions

    def open(self, blocks: int, tokens: float, told: Callable[[], None]) -> SimulatedPlace | Refusal:
        """Let a session in that may hold so many tokens in some of its blocks, or say when there is room."""
        lease = self._budget.lease(max(1, int(blocks * self._model.size.token_bytes)))
        try:
            lease.resize(1, int(tokens))
        except CacheFullError as error:
            lease.release()
            return self._admission.cache_full(error, len(self.places))
        place = SimulatedPlace(lease, self._clock.now(), told)
        self.places.add(place)
        return place

    def grow(self, place: SimulatedPlace, tokens: int) -> Refusal | None:
        """Let a session's cache hold so many tokens, or say when there is room."""
        try:
            place.lease.grow(1, tokens)
        except CacheFullError as error:
            return self._admission.cache_full(error, len(self.places))
        return None

    def close(self, place: SimulatedPlace) -> None:
        """A session ends here."""
        if place in self.places:
            self.places.remove(place)
            self._admission.left(cast(Any, place))
            place.lease.release()

    # ------------------------------------------------------------------ device

    def alone_s(self, blocks: int, tokens: int) -> float:
        """Seconds of a step of one session that has the device for itself."""
        if tokens == 1:
            return blocks * self.machine.decode_s
        return blocks * (self._assumptions.block_overhead_s + tokens * self.machine.token_s)

    async def compute(self, blocks: int, tokens: int) -> None:
        """Run a step, together with those that wait at the same time."""
        if not self._assumptions.batching:
            await anyio.sleep(self.alone_s(blocks, tokens))
            return
        work = _QueuedWork(blocks, tokens)
        self._waiting.append(work)
        self._work_comes.set()
        await work.done.wait()

    async def _compute_forever(self) -> None:
        while True:
            if not self._waiting:
                self._work_comes = asyncio.Event()
                await self._work_comes.wait()
            room, batch = CHUNK_TOKENS, []
            for work in sorted(self._waiting, key=lambda one: one.left > 1):
                taken = min(work.left, room)
                if not taken:
                    break
                batch.append((work, taken))
                room -= taken
            deepest = max(work.blocks for work, _ in batch)
            tokens = sum(work.blocks * taken for work, taken in batch) / deepest
            await anyio.sleep(self._pass_s(self.machine, deepest, tokens))
            for work, taken in batch:
                work.left -= taken
                if not work.left and not work.done.is_set():
                    self._waiting.remove(work)
                    work.done.set()


def _at(one: Served, span: Span) -> Served:
    """A server, were it to serve these blocks."""
    return one if span == (one.start, one.stop) else replace(one, start=span[0], stop=span[1])


class _QueuedWork:
    """A step that waits for the device."""

    def __init__(self, blocks: int, tokens: int) -> None:
        self.blocks = blocks
        self.left = tokens
        self.done = asyncio.Event()


def _pass_s(machine: Machine, blocks: int, tokens: float) -> float:
    """Weights are read once, and every token takes its share of the arithmetic."""
    return blocks * (machine.decode_s + tokens * machine.token_s)
