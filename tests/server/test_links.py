"""A server links a session to servers that announced the next blocks, and dials nothing else for a client."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import anyio
import pytest

from swarmkit.net.protocol.messages import PUSH, Attached, Link
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.endpoints import listen
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.transport.memory import MemoryNetwork, MemoryTransport
from swarmkit.net.transport.seam import Stream
from swarmkit.server.sessions.links import Links, NextServers, NotLinkedError
from swarmkit.server.sessions.push import Downstream
from swarmkit.simulation.virtual_time import VirtualClock, VirtualTimeLoop

from ..net.announcements import FINGERPRINT, announcement, identity

T = TypeVar("T")

NEXT = 2
"""The first block of the server that is linked to."""
LINK_S = 3.0
INLET = "a" * 32


def in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


class Swarm:
    """A server that links sessions, and another one with the next blocks, in virtual time."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        self.clock = VirtualClock(loop)
        self.network = MemoryNetwork(clock=self.clock.time)
        self.here, self.there = self.join(0), self.join(1)
        registry = Registry(self.here, self.clock.time)
        servers = NextServers(registry, FINGERPRINT, self.clock)
        self.links = Links(lambda: self.here, servers.find, LINK_S, 60.0, self.clock.now)
        self.dialled: list[str] = []
        self.looks = 0
        open_stream, fetch = self.here.open, self.here.fetch

        async def opening(peer_id: str, *args: Any) -> Stream:
            self.dialled.append(peer_id)
            return await open_stream(peer_id, *args)

        async def fetching(keys: Any) -> Any:
            self.looks += 1
            return await fetch(keys)

        self.here.open = opening  # type: ignore[method-assign]
        self.here.fetch = fetching  # type: ignore[method-assign]

    def join(self, number: int) -> MemoryTransport:
        return self.network.transport(identity(number))

    async def announce(self, **changes: Any) -> None:
        """Let the other server say which blocks it serves."""
        fields = {"addresses": tuple(self.there.addresses), "expires_at": self.clock.time() + 30.0}
        said: Announcement = announcement(1, **{**fields, **changes})
        await Registry(self.there, self.clock.time).announce(said)

    async def serve(self) -> None:
        """Let the other server take pushes into one session."""

        async def take(stream: Stream) -> None:
            source = ServerStream(stream, PUSH, max_payload_bytes=0, message_timeout=60.0)
            attach = (await source.next()).message
            if attach.inlet == INLET:
                await source.send(Attached())
            else:
                await source.refuse(Refusal("not_linked", "there is no session of that name"))
            await anyio.sleep(600)

        await listen(self.there, PUSH, take)

    async def link(self, inlet: str = INLET, client: str = "client", **changes: Any) -> Downstream:
        return await self.links.make(Link(self.there.peer_id, (), inlet, **changes), NEXT, client)

    async def failure(self, **link: Any) -> tuple[str, float]:
        """What a link that fails is answered with, and after how many seconds."""
        began = self.clock.now()
        with pytest.raises(NotLinkedError) as failed:
            await self.link(**link)
        return str(failed.value), round(self.clock.now() - began, 6)


def test_a_server_that_announced_the_next_blocks_is_reached() -> None:
    async def main() -> None:
        swarm = Swarm()
        await swarm.announce()
        await swarm.serve()
        assert isinstance(await swarm.link(), Downstream)

    in_virtual_time(main())


@pytest.mark.parametrize(
    "said",
    [
        {"start": 3, "stop": 5},
        {"fingerprint": "f" * 32},
        {"service": 1},
        {"addresses": ("/ip4/127.0.0.1/tcp/22",)},
        {"addresses": ("/ip4/192.168.0.1/tcp/80",)},
        {"addresses": ()},
    ],
    ids=["other blocks", "another model", "another service", "this machine", "its network", "no address"],
)
def test_a_server_that_did_not_is_not_dialled(said: dict[str, Any]) -> None:
    async def main() -> list[str]:
        swarm = Swarm()
        await swarm.announce(**said)
        await swarm.serve()
        await swarm.failure()
        return swarm.dialled

    assert in_virtual_time(main()) == []


def test_addresses_that_the_client_names_are_not_dialled() -> None:
    async def main() -> list[str]:
        swarm = Swarm()
        with pytest.raises(NotLinkedError):
            await swarm.links.make(Link(swarm.there.peer_id, ("/ip4/8.8.8.8/tcp/22",), INLET), NEXT, "client")
        return swarm.dialled

    assert in_virtual_time(main()) == []


async def unknown(swarm: Swarm) -> tuple[str, float]:
    return await swarm.failure()


async def closed(swarm: Swarm) -> tuple[str, float]:
    await swarm.announce()
    await swarm.there.close()
    return await swarm.failure()


async def serving_nothing(swarm: Swarm) -> tuple[str, float]:
    await swarm.announce()
    return await swarm.failure()


async def mute(swarm: Swarm) -> tuple[str, float]:
    await swarm.announce()
    await swarm.serve()
    swarm.network.hang(swarm.there.peer_id)
    return await swarm.failure()


async def without_the_session(swarm: Swarm) -> tuple[str, float]:
    await swarm.announce()
    await swarm.serve()
    return await swarm.failure(inlet="b" * 32)


@pytest.mark.parametrize("fails", [unknown, closed, serving_nothing, mute, without_the_session])
def test_every_failure_is_told_alike_and_after_the_same_time(fails: Any) -> None:
    async def main() -> tuple[str, float]:
        return await fails(Swarm())

    assert in_virtual_time(main()) == ("the next server cannot be reached", LINK_S)


def test_a_hundred_links_to_unknown_servers_share_their_looks() -> None:
    async def main() -> int:
        swarm = Swarm()
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(swarm.failure)
        return swarm.looks

    assert in_virtual_time(main()) == 1


def test_a_server_that_is_known_is_not_looked_up_again() -> None:
    async def main() -> int:
        swarm = Swarm()
        await swarm.announce()
        await swarm.serve()
        for _ in range(5):
            await swarm.link()
        return swarm.looks

    assert in_virtual_time(main()) == 1


def test_an_announcement_that_expired_is_looked_up_again() -> None:
    async def main() -> str:
        swarm = Swarm()
        await swarm.announce()
        await swarm.serve()
        await swarm.link()
        await anyio.sleep(40.0)
        return (await swarm.failure())[0]

    assert in_virtual_time(main()) == "the next server cannot be reached"


def test_a_client_whose_links_hang_does_not_delay_another_one() -> None:
    async def main() -> float:
        swarm = Swarm()
        await swarm.announce()
        await swarm.serve()
        third = swarm.join(2)
        said = announcement(2, addresses=third.addresses, expires_at=swarm.clock.time() + 30.0)
        await Registry(third, swarm.clock.time).announce(said)
        swarm.network.hang(third.peer_id)

        async def hang() -> None:
            with pytest.raises(NotLinkedError):
                await swarm.links.make(Link(third.peer_id, (), INLET), NEXT, "stranger")

        async with anyio.create_task_group() as tasks:
            for _ in range(200):
                tasks.start_soon(hang)
            await anyio.sleep(0.1)
            began = swarm.clock.now()
            await swarm.link()
            return swarm.clock.now() - began

    assert in_virtual_time(main()) < 0.1
