"""Peers dial each other back, so that each learns whether it can be reached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from swarmkit.errors import RemoteError
from swarmkit.net.hivemind.transport import HivemindTransport
from swarmkit.net.protocol.reach_messages import DialedBack
from swarmkit.net.rpc import dial_back
from swarmkit.net.rpc.dial_back import DialBackService, ask_to_dial_back
from swarmkit.net.transport.memory import MemoryNetwork, MemoryTransport
from swarmkit.net.transport.part import PartTransport

pytestmark = pytest.mark.timeout(60)


class AtHome(PartTransport):
    """A peer that listens on loopback, and so may dial there."""

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"/ip4/127.0.0.1/tcp/1/p2p/{self.peer_id}",)


@dataclass
class Pair:
    """A peer that dials back, and one that asks it to, in memory."""

    asked: PartTransport
    asking: MemoryTransport
    network: MemoryNetwork

    async def ask(self, port: int) -> DialedBack:
        return await ask_to_dial_back(self.asking, self.asked.peer_id, (), port, 10.0)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    network = MemoryNetwork()
    found = Pair(AtHome(network.transport()), network.transport(), network)
    network.hosts[found.asking.peer_id] = "127.0.0.1"
    await DialBackService(found.asked).start()
    yield found
    await found.asking.close()
    await found.asked.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_back, "DIAL_TIMEOUT_S", 0.2)


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[int, list[Any]]]:
    """A port of this machine, and those who have come there."""
    came: list[Any] = []

    def come(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(writer.get_extra_info("peername"))
        writer.close()

    server = await asyncio.start_server(come, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], came


async def test_a_port_where_somebody_listens_is_reached(pair: Pair) -> None:
    async with listening() as (port, _):
        assert await pair.ask(port) == DialedBack(True, "127.0.0.1")


async def test_a_port_where_nobody_listens_is_not(pair: Pair, hasty: None) -> None:
    async with listening() as (port, _):
        pass
    assert await pair.ask(port) == DialedBack(False, "127.0.0.1")


@pytest.mark.parametrize("host", ["", "192.168.3.4", "0.0.0.0", "not a host"])
async def test_only_the_host_that_a_peer_comes_from_is_dialled(pair: Pair, hasty: None, host: str) -> None:
    pair.network.hosts[pair.asking.peer_id] = host
    async with listening() as (port, came):
        answer = await pair.ask(port)
    assert (answer, came) == (DialedBack(False, ""), [])


async def test_no_port_of_the_system_is_dialled(pair: Pair) -> None:
    with pytest.raises(RemoteError, match="port"):
        await pair.ask(22)


async def test_few_are_dialled_at_a_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_back, "MOST_AT_A_TIME", 0)
    with pytest.raises(RemoteError, match="too many peers"):
        await pair.ask(2000)


async def test_over_libp2p_a_peer_is_dialled_where_it_is_seen() -> None:
    asked = await HivemindTransport.create()
    await DialBackService(asked).start()
    asking = await HivemindTransport.create(initial_peers=asked.addresses)
    try:
        port = int(asking.addresses[0].split("/")[4])
        answer = await ask_to_dial_back(asking, asked.peer_id, asked.addresses, port, 10.0)
    finally:
        await asking.close()
        await asked.close()
    assert answer == DialedBack(True, "127.0.0.1")
