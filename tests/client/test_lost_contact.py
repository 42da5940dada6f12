"""A client that loses contact with the swarm keeps what it knows, and says what is wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.client.swarm.connection import AloneHost
from swarmkit.errors import NoContactError
from swarmkit.net.registry.registry import Registry
from swarmkit.net.transport.memory import MemoryNetwork, MemoryTransport

from ..net.announcements import FINGERPRINT, NOW, announcement, identity


class SetClock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.moment = NOW

    def now(self) -> float:
        return self.moment

    def time(self) -> float:
        return self.moment


class World:
    """A client, and a server that has announced blocks 2:4 for a minute."""

    def __init__(self) -> None:
        self.clock = SetClock()
        self.network = MemoryNetwork(clock=self.clock.time)
        self.server = self.network.transport(identity(0))
        self.transports: list[MemoryTransport] = []
        self.client = SwarmClient(ModelRef("tiny", FINGERPRINT, 6, 8), clock=self.clock)
        self.host = AloneHost(self._factory, self.clock)

    async def _factory(self, *options: object) -> MemoryTransport:
        self.transports.append(self.network.transport(*options))  # type: ignore[arg-type]
        return self.transports[-1]

    @property
    def link(self) -> tuple[str, str]:
        return self.transports[0].peer_id, self.server.peer_id

    async def lose_contact_for(self, seconds: float) -> None:
        self.network.cut(*self.link)
        self.clock.moment += seconds
        with pytest.raises(NoContactError):
            await self.client.known.refresh()


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    world = World()
    await Registry(world.server, world.clock.time).announce(announcement(0))
    async with anyio.create_task_group() as tasks:
        await tasks.start(world.host.run_client, world.client)
        yield world
        world.client.request_stop()


async def test_servers_that_were_known_stay_known_while_there_is_no_contact() -> None:
    async with world() as swarm:
        await swarm.lose_contact_for(300)
        assert [server.peer_id for server in swarm.client.known.servers()] == [swarm.server.peer_id]


async def test_servers_whose_announcements_ended_meanwhile_go_once_there_is_contact() -> None:
    async with world() as swarm:
        await swarm.lose_contact_for(300)
        swarm.network.heal(*swarm.link)
        await swarm.client.known.refresh()
        assert swarm.client.known.servers() == []


async def test_the_error_says_that_the_client_has_no_contact() -> None:
    async with world() as swarm:
        await swarm.lose_contact_for(1)
        assert "this client has no contact with the swarm" in str(swarm.client.known.no_route(0, 2))


async def test_with_contact_the_error_names_the_blocks_that_no_server_has() -> None:
    async with world() as swarm:
        await swarm.lose_contact_for(1)
        swarm.network.heal(*swarm.link)
        await swarm.client.known.refresh()
        assert "0:2" in str(swarm.client.known.no_route(0, 4))
        assert "contact" not in str(swarm.client.known.no_route(0, 4))
