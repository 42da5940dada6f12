"""The faults that a memory network can be told to have."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from swarmkit.errors import PeerTimeoutError, PeerUnreachableError, TransportError, UsageError
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork, MemoryTransport
from swarmkit.net.transport.seam import Stream

from .worlds import collector, echo, own_tasks

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(30)]


async def connected(network: MemoryNetwork) -> tuple[MemoryTransport, MemoryTransport, Stream, Stream]:
    server, client = network.transport(), network.transport()
    handler, streams = collector()
    await server.listen("talk", handler)
    here = await client.open(server.peer_id, "talk")
    return client, server, here, await streams.get()


async def is_quiet(stream: Stream) -> bool:
    """Whether nothing arrives for a moment."""
    try:
        await asyncio.wait_for(stream.receive(), 0.02)
    except asyncio.TimeoutError:
        return True
    return False


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_two_peers_of_one_identity_cannot_be_there() -> None:
    network, identity = MemoryNetwork(), Identity()
    network.transport(identity)
    with pytest.raises(UsageError, match="already"):
        network.transport(identity)


async def test_an_identity_may_come_back() -> None:
    network, identity = MemoryNetwork(), Identity()
    await network.transport(identity).close()
    assert network.transport(identity).peer_id == identity.peer_id


# death


async def test_frames_under_way_die_with_their_sender() -> None:
    network = MemoryNetwork()
    client, _, here, there = await connected(network)
    await here.send(b"never read")
    network.kill(client.peer_id)
    with pytest.raises(PeerUnreachableError):
        await there.receive()


async def test_death_wakes_who_waits_for_the_dead() -> None:
    network = MemoryNetwork()
    _, server, here, _ = await connected(network)
    receiving = asyncio.create_task(here.receive())
    await asyncio.sleep(0)
    network.kill(server.peer_id)
    with pytest.raises(PeerUnreachableError):
        await receiving


async def test_death_wakes_who_waits_to_send() -> None:
    network = MemoryNetwork()
    _, server, here, _ = await connected(network)

    async def flood() -> None:
        while True:
            await here.send(bytes(1_000_000))

    sending = asyncio.create_task(flood())
    await asyncio.sleep(0.01)
    network.kill(server.peer_id)
    with pytest.raises(PeerUnreachableError):
        await sending


async def test_death_wakes_who_waits_for_a_delayed_frame() -> None:
    network = MemoryNetwork()
    client, server, here, there = await connected(network)
    network.set_link(client.peer_id, server.peer_id, delay=3600)
    await here.send(b"x")
    receiving = asyncio.create_task(there.receive())
    await asyncio.sleep(0)
    network.kill(client.peer_id)
    with pytest.raises(PeerUnreachableError):
        await receiving


async def test_the_dead_can_do_nothing() -> None:
    network = MemoryNetwork()
    client, server, _, _ = await connected(network)
    network.kill(client.peer_id)
    with pytest.raises(TransportError, match="killed"):
        await client.open(server.peer_id, "talk")


async def test_the_deads_handlers_are_cancelled() -> None:
    network, before = MemoryNetwork(), own_tasks()
    _, server, _, _ = await connected(network)
    network.kill(server.peer_id)
    await server.close()
    assert own_tasks() == before


async def test_only_those_who_are_there_can_be_killed() -> None:
    with pytest.raises(UsageError):
        MemoryNetwork().kill("nobody")


# silence


async def test_a_hung_peer_says_nothing() -> None:
    network = MemoryNetwork()
    _, server, here, there = await connected(network)
    network.hang(server.peer_id)
    await there.send(b"x")
    assert await is_quiet(here)


async def test_a_hung_peer_hears_nothing() -> None:
    network = MemoryNetwork()
    _, server, here, there = await connected(network)
    network.hang(server.peer_id)
    await here.send(b"x")
    assert await is_quiet(there)


async def test_what_was_held_arrives_in_order_after_a_resume() -> None:
    network = MemoryNetwork()
    _, server, here, there = await connected(network)
    network.hang(server.peer_id)
    await here.send(b"1")
    await here.send(b"2")
    receiving = asyncio.create_task(there.receive())
    await asyncio.sleep(0)
    network.resume(server.peer_id)
    assert [await receiving, await there.receive()] == [b"1", b"2"]


async def test_opening_to_a_hung_peer_times_out() -> None:
    network = MemoryNetwork()
    client, server, _, _ = await connected(network)
    network.hang(server.peer_id)
    with pytest.raises(PeerTimeoutError):
        await client.open(server.peer_id, "talk", timeout=0.02)


async def test_opening_goes_on_when_the_peer_resumes() -> None:
    network = MemoryNetwork()
    client, server, _, _ = await connected(network)
    network.hang(server.peer_id)
    opening = asyncio.create_task(client.open(server.peer_id, "talk"))
    await asyncio.sleep(0)
    network.resume(server.peer_id)
    assert (await opening).peer_id == server.peer_id


async def test_nobody_learns_that_a_hung_peer_closed_its_stream() -> None:
    network = MemoryNetwork()
    _, server, here, there = await connected(network)
    network.hang(server.peer_id)
    there.close()
    assert await is_quiet(here)


async def test_a_hung_peer_can_be_killed() -> None:
    network = MemoryNetwork()
    _, server, here, _ = await connected(network)
    network.hang(server.peer_id)
    network.kill(server.peer_id)
    with pytest.raises(PeerUnreachableError):
        await here.receive()


# links


async def test_a_frame_is_not_there_before_its_delay_is_over() -> None:
    network = MemoryNetwork()
    client, server, here, there = await connected(network)
    network.set_link(client.peer_id, server.peer_id, delay=3600)
    await here.send(b"x")
    assert await is_quiet(there)


async def test_a_delayed_frame_arrives() -> None:
    network = MemoryNetwork()
    client, server, here, there = await connected(network)
    network.set_link(client.peer_id, server.peer_id, delay=0.02)
    before = asyncio.get_running_loop().time()
    await here.send(b"x")
    await there.receive()
    assert asyncio.get_running_loop().time() - before >= 0.02


async def test_frames_under_way_do_not_wait_for_each_other() -> None:
    network = MemoryNetwork()
    client, server, here, there = await connected(network)
    network.set_link(client.peer_id, server.peer_id, delay=0.05)
    before = asyncio.get_running_loop().time()
    for _ in range(1000):
        await here.send(b"x")
    for _ in range(1000):
        await there.receive()
    assert asyncio.get_running_loop().time() - before < 1000 * 0.05


async def test_delays_do_not_reach_other_links() -> None:
    network = MemoryNetwork()
    client, _, here, there = await connected(network)
    network.set_link(client.peer_id, network.transport().peer_id, delay=3600)
    await here.send(b"x")
    assert await there.receive() == b"x"


async def test_a_failed_send_ends_the_stream_for_the_sender() -> None:
    network = MemoryNetwork()
    client, server, here, _ = await connected(network)
    network.set_link(client.peer_id, server.peer_id, fail_rate=1.0)
    with pytest.raises(PeerUnreachableError):
        await here.send(b"x")


async def test_a_failed_send_ends_the_stream_for_the_receiver() -> None:
    network = MemoryNetwork()
    client, server, here, there = await connected(network)
    network.set_link(client.peer_id, server.peer_id, fail_rate=1.0)
    with pytest.raises(PeerUnreachableError):
        await here.send(b"x")
    with pytest.raises(PeerUnreachableError):
        await there.receive()


async def sends_until_failure(seed: int) -> int:
    network = MemoryNetwork(seed=seed)
    server, client = network.transport(), network.transport()
    await server.listen("echo", echo)
    network.set_link(client.peer_id, server.peer_id, fail_rate=0.05)
    stream = await client.open(server.peer_id, "echo")
    count = 0
    with contextlib.suppress(PeerUnreachableError):
        while count < 10_000:
            await stream.send(b"x")
            await stream.receive()
            count += 1
    return count


async def test_the_same_seed_brings_the_same_failures() -> None:
    assert await sends_until_failure(7) == await sends_until_failure(7)


async def test_another_seed_brings_other_failures() -> None:
    assert len({await sends_until_failure(seed) for seed in range(10)}) > 1


async def test_setting_the_delay_keeps_the_fail_rate() -> None:
    network = MemoryNetwork()
    network.set_link("a", "b", fail_rate=0.5)
    network.set_link("b", "a", delay=1.0)
    assert network.link("a", "b").fail_rate == 0.5


async def test_a_cut_ends_streams() -> None:
    network = MemoryNetwork()
    client, server, here, _ = await connected(network)
    network.cut(client.peer_id, server.peer_id)
    with pytest.raises(PeerUnreachableError):
        await here.receive()


async def test_a_cut_keeps_new_streams_from_being_opened() -> None:
    network = MemoryNetwork()
    client, server, _, _ = await connected(network)
    network.cut(server.peer_id, client.peer_id)
    with pytest.raises(PeerUnreachableError):
        await client.open(server.peer_id, "talk")


async def test_a_cut_can_be_healed() -> None:
    network = MemoryNetwork()
    client, server, _, _ = await connected(network)
    network.cut(client.peer_id, server.peer_id)
    network.heal(client.peer_id, server.peer_id)
    assert (await client.open(server.peer_id, "talk")).peer_id == server.peer_id


# queues


async def test_a_sender_that_gives_up_lets_the_next_one_send() -> None:
    network = MemoryNetwork()
    _, _, here, there = await connected(network)
    await here.send(bytes(2_000_000))
    waiting = [asyncio.create_task(here.send(bytes([number]))) for number in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await there.receive()
    assert [await there.receive(), await there.receive()] == [b"\1", b"\2"]


# the table


async def test_records_expire_by_the_networks_clock() -> None:
    clock = Clock()
    peer = MemoryNetwork(clock=clock).transport()
    await peer.store([("k", b"v")], clock.now + 10)
    clock.now += 10
    assert await peer.fetch(["k"]) == {}


async def test_records_outlive_their_peer() -> None:
    network = MemoryNetwork()
    one, two = network.transport(), network.transport()
    await one.store([("k", b"v")], time.time() + 60)
    network.kill(one.peer_id)
    assert await two.fetch(["k"]) == {"k": {one.peer_id: b"v"}}
