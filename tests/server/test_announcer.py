"""A server's announcements, whatever its clock does."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from swarmkit.errors import TransportError
from swarmkit.net.registry.acceptance import is_acceptable
from swarmkit.net.registry.registry import Registry
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.server.announcer import Announcer
from swarmkit.server.config import ServerConfig
from swarmkit.settings import ServerSettings
from swarmkit.simulation.virtual_time import VirtualClock, VirtualTimeLoop

from .worlds import World

NOW = 1.8e9


class WrongClock:
    """A clock that is wrong by as much as the test says."""

    wrong_s = 0.0

    def now(self) -> float:
        return 0.0

    def time(self) -> float:
        return NOW + self.wrong_s


async def test_a_server_whose_clock_was_early_is_known_again_once_it_is_right(world: World) -> None:
    network, clock = MemoryNetwork(clock=lambda: NOW), WrongClock()
    transport = network.transport(record_check=lambda *record: is_acceptable(*record, NOW))
    registry = Registry(transport, clock.time)
    fingerprint = world.checkpoint.fingerprint
    announcer = Announcer(registry, ServerConfig(checkpoint=world.checkpoint), fingerprint, (0, 2), 0, clock)
    clock.wrong_s = 2 * 3600.0
    await announcer.announce(state="online")  # which peers refuse, as it is dated too far ahead
    clock.wrong_s = 0.0
    await announcer.announce(state="online")
    found = await registry.look_up(fingerprint, world.checkpoint.num_blocks)
    assert [server.peer_id for server in found.servers(NOW)] == [transport.peer_id]


class Unreliable:
    """A server's announcements in virtual time over a table that fails now and then, and who sees them."""

    def __init__(self, world: World, clock: VirtualClock, failures: list[int]) -> None:
        """Args: failures: which announcements fail, counted from 1."""
        self.clock = clock
        self.network = MemoryNetwork(clock=clock.time)
        transport = self.network.transport()
        self.registry = Registry(transport, clock.time)
        self.fingerprint = world.checkpoint.fingerprint
        self.num_blocks = world.checkpoint.num_blocks
        self.said_at: list[float] = []
        works = transport.store

        async def store(records: Any, expires_at: float, service: int = 0) -> int:
            self.said_at.append(clock.now())
            if len(self.said_at) in failures:
                raise TransportError("the table is away")
            return await works(records, expires_at, service)

        transport.store = store  # type: ignore[method-assign]
        settings = ServerSettings().replace(announce_period_s=10.0, record_lifetime_s=30.0)
        config = ServerConfig(checkpoint=world.checkpoint, settings=settings)
        self.announcer = Announcer(self.registry, config, self.fingerprint, (0, 2), 0, clock)

    async def seen_for(self, seconds: float) -> list[int]:
        """How many servers are seen in each second while the server announces itself again and again."""
        await self.announcer.announce(state="online")
        seen, end = [], anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.announcer.announce_until, end, dict)
            for _ in range(int(seconds)):
                await anyio.sleep(1.0)
                found = await self.registry.look_up(self.fingerprint, self.num_blocks)
                seen.append(len(found.servers(self.clock.time())))
            end.set()
        return seen


def in_virtual_time(world: World, failures: list[int], seconds: float) -> tuple[list[int], list[float]]:
    async def main() -> tuple[list[int], list[float]]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        table = Unreliable(world, VirtualClock(loop), failures)
        return await table.seen_for(seconds), table.said_at

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


@pytest.mark.parametrize("failures", [[2], [3, 5], [2, 3, 4]])
def test_missed_announcements_withdraw_nothing(world: World, failures: list[int]) -> None:
    seen, _ = in_virtual_time(world, failures, 80.0)
    assert set(seen) == {1}


def test_an_announcement_that_failed_is_repeated_sooner(world: World) -> None:
    _, said_at = in_virtual_time(world, [2], 30.0)
    assert said_at == [0.0, 10.0, 15.0, 25.0]
