"""Sends that fail on purpose."""

from __future__ import annotations

import time

import pytest

from swarmkit.bench.faulty_transport import Faults, with_faults
from swarmkit.errors import PeerUnreachableError
from swarmkit.local.swarm import over_memory
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import Stream, Transport

from ..net.worlds import collector, echo

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(30)]


async def client_of(network: MemoryNetwork, faults: Faults) -> Transport:
    return await with_faults(over_memory(network), faults)(Identity(), lambda *record: True)


async def stream_with(faults: Faults) -> Stream:
    """A stream to a peer that sends everything back."""
    network = MemoryNetwork()
    server = network.transport()
    await server.listen("echo", echo)
    return await (await client_of(network, faults)).open(server.peer_id, "echo")


async def test_without_faults_frames_pass() -> None:
    stream = await stream_with(Faults(0.0))
    await stream.send(b"a", b"b")
    assert await stream.receive() == b"ab"


async def test_a_send_that_fails_is_a_lost_peer() -> None:
    stream = await stream_with(Faults(1.0))
    with pytest.raises(PeerUnreachableError, match="on purpose") as caught:
        await stream.send(b"x")
    assert caught.value.peer_id == stream.peer_id


async def test_the_other_side_sees_the_end_and_nothing_of_the_frame() -> None:
    network = MemoryNetwork()
    server = network.transport()
    handler, streams = collector()
    await server.listen("talk", handler)
    here = await (await client_of(network, Faults(1.0))).open(server.peer_id, "talk")
    with pytest.raises(PeerUnreachableError):
        await here.send(b"x")
    with pytest.raises(PeerUnreachableError):
        await (await streams.get()).receive()


async def test_after_a_failed_send_the_stream_stays_ended() -> None:
    stream = await stream_with(Faults(1.0))
    with pytest.raises(PeerUnreachableError):
        await stream.send(b"x")
    with pytest.raises(PeerUnreachableError):
        await stream.receive()


async def test_the_shared_table_has_no_faults() -> None:
    client = await client_of(MemoryNetwork(), Faults(1.0))
    await client.store([("key", b"value")], time.time() + 60)
    assert await client.fetch(["key"]) == {"key": {client.peer_id: b"value"}}


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.1, 60, 140), (1.0, 1000, 1000)])
async def test_as_many_sends_fail_as_were_asked_for(probability: float, low: int, high: int) -> None:
    faults = Faults(probability, seed=1)
    struck = sum(faults.strikes() for _ in range(1000))
    assert low <= struck <= high
    assert (faults.sends, faults.failed) == (1000, struck)


async def test_the_same_seed_fails_the_same_sends() -> None:
    def strikes(seed: int) -> list[bool]:
        faults = Faults(0.5, seed)
        return [faults.strikes() for _ in range(50)]

    assert strikes(1) == strikes(1)
    assert strikes(1) != strikes(2)
