"""Peers of a local network that find each other by mDNS: over loopback, and between network namespaces."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from zeroconf.asyncio import AsyncServiceInfo

from swarmkit.errors import TransportError
from swarmkit.net.connect import in_lan
from swarmkit.net.lan import SERVICE, LanTransport, find, places_in, read_advertisement, resolved
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.part import PartTransport
from swarmkit.net.transport.seam import Transport

from ..namespaces import Lan

pytestmark = pytest.mark.timeout(60)

LOOPBACK = ["127.0.0.1"]
PEER = Identity(bytes(range(32))).peer_id


class At(PartTransport):
    """A peer that listens at addresses of a test's choice."""

    def __init__(self, *addresses: str) -> None:
        super().__init__(MemoryNetwork().transport())
        self._own = addresses

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(f"{address}/p2p/{self.peer_id}" for address in self._own)


@asynccontextmanager
async def advertised(transport: Transport, swarm: str = "") -> AsyncIterator[Transport]:
    peer = await LanTransport.advertise(transport, swarm, LOOPBACK)
    try:
        yield peer
    finally:
        await peer.close()


async def found(swarm: str = "", patience_s: float = 4.0) -> list[str]:
    return await find(swarm, LOOPBACK, patience_s)


async def test_a_peer_that_is_advertised_is_found() -> None:
    async with advertised(At("/ip4/127.0.0.1/tcp/31337")) as peer:
        assert f"/ip4/127.0.0.1/tcp/31337/p2p/{peer.peer_id}" in await found()


async def test_peers_of_a_private_swarm_find_their_own_only() -> None:
    async with advertised(At("/ip4/127.0.0.1/tcp/31337"), "ab" * 16) as peer:
        mine = await found("ab" * 16)
        others = [*await found("cd" * 16, 1.0), *await found("", 1.0)]
    assert [peer.peer_id in address for address in mine] == [True]
    assert not any(peer.peer_id in address for address in others)


async def test_nobody_is_found_after_the_peer_has_left() -> None:
    async with advertised(At("/ip4/127.0.0.1/tcp/31337")) as peer:
        pass
    assert not any(peer.peer_id in address for address in await found(patience_s=1.0))


def test_loopback_is_not_advertised_beside_an_address_of_the_network() -> None:
    places = places_in(At("/ip4/127.0.0.1/tcp/1", "/ip4/192.0.2.7/tcp/1").addresses)
    assert [str(host) for host, _ in places] == ["192.0.2.7"]


async def test_a_peer_that_listens_nowhere_is_not_advertised() -> None:
    transport = At()
    assert await LanTransport.advertise(transport, "", LOOPBACK) is transport
    await transport.close()


@pytest.mark.parametrize(
    ("name", "port"), [("nobody", 31337), (PEER[:-1], 31337), (PEER, 0)], ids=["name", "id", "port"]
)
async def test_what_is_malformed_is_not_believed(name: str, port: int) -> None:
    info = AsyncServiceInfo(
        SERVICE, f"{name}.{SERVICE}", port=port, properties={"swarm": ""}, addresses=[bytes(4)]
    )
    assert read_advertisement(info, "") == ("", [])


async def test_addresses_are_kept_where_lan_is_not_asked_for() -> None:
    assert await in_lan(["/ip4/192.0.2.7/tcp/1"]) == ["/ip4/192.0.2.7/tcp/1"]


async def test_who_finds_nobody_is_told_what_to_do() -> None:
    with pytest.raises(TransportError, match="--lan and --host"):
        await resolved(["lan"], "ef" * 16, LOOPBACK, patience_s=0.2)


async def test_looking_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    await found("ef" * 16, 0.2)
    assert asyncio.all_tasks() == before


PROGRAM = """
import asyncio, json, sys
from swarmkit.net.connect import over_hivemind
from swarmkit.net.transport.identity import Identity

async def main(role, host):
    joined = over_hivemind(["lan"] if role == "joins" else [], host=host, lan=role == "waits")
    transport = await joined(Identity(), lambda *_: True)
    print(json.dumps({"peer_id": transport.peer_id, "addresses": list(transport.addresses)}), flush=True)
    if role == "waits":
        await asyncio.to_thread(sys.stdin.read)
    await transport.close()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_machines_of_a_network_find_each_other_and_join() -> None:
    with Lan() as lan:
        first, second = lan.machine(), lan.machine()
        for machine in (first, second):
            machine.run_ip("route", "add", "224.0.0.0/4", "dev", "eth0")
        command = (sys.executable, "-c", PROGRAM)
        waiting = subprocess.Popen(
            [*first.inside, *command, "waits", "0.0.0.0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert waiting.stdout is not None
            assert json.loads(waiting.stdout.readline())["peer_id"]
            joining = subprocess.run(
                [*second.inside, *command, "joins", second.address],
                capture_output=True,
                text=True,
                timeout=40,
                check=False,
            )
        finally:
            waiting.communicate(timeout=40)
        assert joining.returncode == 0, joining.stderr
