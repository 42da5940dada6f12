"""A server looks now and then whether the swarm needs it more with other blocks, and moves there by itself.

Whether to move is decided by a pure rule over what servers announce (`swarmkit/placement/together.py`). What
is done here is to look, at times that differ from server to server, and to look twice: several servers that
see the same need at the same moment would all meet it. So a server announces where it means to go, and looks
again when all others can know of it (`swarmkit/placement/move_protocol.py`).

A server that crashed stays in the table until its announcement ends. Some servers are asked for a sign of
life at each look, so that its place is taken before that.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Protocol

import anyio
import anyio.to_thread
import msgspec

from swarmkit.clock import Clock
from swarmkit.errors import SwarmkitError, UsageError
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.registry.swarm_map import SwarmMap
from swarmkit.placement.choice import PlacementPolicy, choose
from swarmkit.placement.description import Machine, ModelSize, Served
from swarmkit.placement.intentions import AnnouncedRun, Overdue, Span, expected
from swarmkit.placement.move_protocol import move_if_needed
from swarmkit.placement.ranges import uncovered
from swarmkit.placement.signs_of_life import GoneServers, gone, to_ask
from swarmkit.placement.together import PlacementMover
from swarmkit.settings import MovingSettings

logger = logging.getLogger(__name__)

_HURRY = 4
"""While blocks are missing, servers look so many times as often."""
_LEAST_RATE = 1e-6


class Movable(Protocol):
    """A server that can move."""

    @property
    def blocks(self) -> tuple[int, int]: ...

    @property
    def rate(self) -> float: ...

    @property
    def load_s(self) -> float: ...

    async def intend(self, blocks: Span | None) -> None: ...

    async def move(self, blocks: Span, why: str, *, if_not_needed: bool) -> None: ...


class Relocation:
    """Moves one server, by its settings."""

    def __init__(
        self,
        server: Movable,
        registry: Registry,
        fingerprint: str,
        num_blocks: int,
        settings: MovingSettings,
        clock: Clock,
        is_there: Callable[[Announcement], Awaitable[bool]],
    ) -> None:
        """Make it; `run` moves.

        Args:
            num_blocks: of the whole model.
            is_there: asks a server for a sign of life.
        """
        self._server = server
        self._registry = registry
        self._fingerprint = fingerprint
        self._num_blocks = num_blocks
        self._settings = settings
        self._clock = clock
        self._is_there = is_there
        self._chance = random.Random(secrets.token_hex(8))
        self._mover = PlacementMover()
        self._overdue = Overdue()
        self._gone = GoneServers()
        self._is_hurried = False
        self._reason = ""
        """Why the place that it found is better."""

    async def run(self) -> None:
        """Look and move, until cancelled."""
        while True:
            pause_s = self._settings.move_period_s / (_HURRY if self._is_hurried else 1)
            await anyio.sleep(self._chance.uniform(0.5, 1.5) * pause_s)
            try:
                await move_if_needed(self, self._notice)
            except UsageError as error:
                logger.info("did not move: %s", error)
            except (SwarmkitError, MemoryError, OSError, RuntimeError) as error:
                logger.warning("could not move to other blocks, will look again: %s", error)

    async def _notice(self) -> None:
        await anyio.sleep(self._settings.move_notice_s)

    async def tell(self, blocks: Span | None) -> None:
        """See `MovingServer`."""
        await self._server.intend(blocks)

    async def go(self, blocks: Span) -> None:
        """See `MovingServer`."""
        await self._server.move(blocks, self._reason, if_not_needed=True)

    async def look(self, before: Collection[str] | None) -> tuple[Span | None, Collection[str]]:
        """See `MovingServer`."""
        own_id = self._registry.peer_id
        view = await self._registry.look_up(self._fingerprint, self._num_blocks)
        present = [one for one in in_reach(view, self._clock.time()) if one.peer_id != own_id]
        movers = {one.peer_id for one in present if one.moving_to}
        overdue = self._overdue.at(self._clock.now(), announced_runs(present))
        others = await self._not_gone(as_expected(own_id, present, before, overdue))
        (low, high), rate = self._server.blocks, max(self._server.rate, _LEAST_RATE)
        ranges = [(low, high), *((one.start, one.stop) for one in others)]
        self._is_hurried = bool(uncovered(0, self._num_blocks, ranges))
        decide = partial(
            self._mover.better_place,
            _machine(high - low, rate),
            Served(low, high, rate),
            _served(others),
            _model(self._num_blocks),
            policy=PlacementPolicy(least_gain=self._settings.move_gain),
            move_s=self._server.load_s,
            count=high - low,
        )
        found = await anyio.to_thread.run_sync(decide)
        if found is None:
            return None, movers
        self._reason = found.reason
        return (found.start, found.stop), movers

    async def _not_gone(self, servers: list[Announcement]) -> list[Announcement]:
        """Those that give a sign of life, or are not asked for one."""
        announced = [(one.service_id, one.sequence) for one in servers]
        known = self._gone.among(announced)
        asked, silent = set(known), set(known)

        async def ask(number: int) -> None:
            if not await self._is_there(servers[number]):
                silent.add(number)

        while turn := to_ask(self._num_blocks, servers, asked, silent, self._chance.random):
            asked.update(turn)
            async with anyio.create_task_group() as tasks:
                for number in turn:
                    tasks.start_soon(ask, number)
        away = gone(asked - known, silent - known)
        self._gone.note(announced[number] for number in away)
        return [one for number, one in enumerate(servers) if number not in away and number not in known]


def first_place(num_blocks: int, count: int, rate: float, others: Iterable[Announcement]) -> tuple[int, int]:
    """The `count` blocks [start, stop) of a model that a newcomer serves.

    Args:
        rate: decode steps per second through all of them, as expected.
        others: the servers that are here, or are about to be.
    """
    return choose(_machine(count, max(rate, _LEAST_RATE)), _served(others), _model(num_blocks), count=count)


def _machine(count: int, rate: float) -> Machine:
    # How many blocks fit is decided before, so that memory is no matter here.
    return Machine(memory_bytes=count, decode_s=1.0 / (rate * count), token_s=1.0 / (rate * count))


def _model(num_blocks: int) -> ModelSize:
    return ModelSize(num_blocks=num_blocks, block_bytes=1.0, token_bytes=0.0)


def _served(servers: Iterable[Announcement]) -> list[Served]:
    return [Served(one.start, one.stop, max(one.throughput, _LEAST_RATE), one.service_id) for one in servers]


def in_reach(view: SwarmMap, now: float) -> list[Announcement]:
    """The servers that are here, or are about to be."""
    return view.servers(now, ("joining", "online"))


def as_expected(
    own_id: str,
    servers: Sequence[Announcement],
    before: Collection[str] | None = None,
    overdue: Collection[str] = (),
) -> list[Announcement]:
    """Servers with the blocks that they are about to serve; see `expected`."""
    places = expected(own_id, announced_runs(servers), before, overdue)
    return [msgspec.structs.replace(servers[number], start=low, stop=high) for number, (low, high) in places]


def announced_runs(servers: Iterable[Announcement]) -> list[AnnouncedRun]:
    """What servers say about their blocks."""
    return [
        AnnouncedRun(one.peer_id, one.start, one.stop, one.state == "online", one.moving_to)
        for one in servers
    ]
