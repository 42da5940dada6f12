"""Peers that lose contact with the swarm find it again by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from swarmkit.errors import NoContactError, SwarmkitError
from swarmkit.net.hivemind.contact import Contact
from swarmkit.net.transport.seam import Stream

from ..clocks import SetClock
from ..waiting import eventually
from .worlds import HivemindWorld, echo


class StoppedClock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.moment = 100.0

    def now(self) -> float:
        return self.moment

    def time(self) -> float:
        return 1e9 + self.moment


ADDRESS = "/ip4/192.0.2.1/tcp/1/p2p/first"


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock()


# what a peer remembers


def test_a_peer_that_started_a_swarm_expects_no_others(clock: StoppedClock) -> None:
    assert not Contact(clock, ()).is_expected


def test_a_peer_that_joined_a_swarm_expects_others(clock: StoppedClock) -> None:
    assert Contact(clock, (ADDRESS,)).is_expected


def test_a_peer_that_has_heard_another_one_expects_it(clock: StoppedClock) -> None:
    contact = Contact(clock, ())
    contact.note_heard()
    assert contact.is_expected


def test_the_time_of_the_last_answer_is_known(clock: StoppedClock) -> None:
    contact = Contact(clock, (ADDRESS,))
    contact.note_heard()
    clock.moment += 60
    assert (contact.heard_at, contact.heard_since(clock.now())) == (1e9 + 100, False)


def test_the_initial_peers_are_tried_each_time(clock: StoppedClock) -> None:
    contact = Contact(clock, (ADDRESS,))
    for number in range(40):
        contact.note_reached(f"peer {number}", (f"/ip4/192.0.2.2/tcp/{number}",))
    assert all("first" in contact.candidates() for _ in range(5))


def test_an_initial_peer_is_tried_where_it_was_reached_last_too(clock: StoppedClock) -> None:
    contact = Contact(clock, (ADDRESS,))
    contact.note_reached("first", ("/ip4/192.0.2.1/tcp/2",))
    assert contact.candidates() == {"first": ("/ip4/192.0.2.1/tcp/2", ADDRESS)}


def test_other_peers_are_tried_in_turns(clock: StoppedClock) -> None:
    contact = Contact(clock, ())
    for number in range(20):
        contact.note_reached(f"peer {number}", (f"/ip4/192.0.2.2/tcp/{number}",))
    tried = {peer for _ in range(3) for peer in contact.candidates()}
    assert tried == {f"peer {number}" for number in range(20)}


def test_the_number_of_remembered_peers_is_bounded(clock: StoppedClock) -> None:
    contact = Contact(clock, ())
    for number in range(1000):
        contact.note_reached(f"peer {number}", ("/ip4/192.0.2.2/tcp/1",))
    assert len({peer for _ in range(200) for peer in contact.candidates()}) == 64


def test_pauses_grow_until_a_peer_is_heard(clock: StoppedClock) -> None:
    contact = Contact(clock, (ADDRESS,))
    growing = [contact.next_pause_s() for _ in range(7)]
    contact.note_heard()
    assert (growing, contact.next_pause_s()) == ([1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0], 1.0)


# over libp2p


@pytest.fixture
async def world() -> AsyncIterator[HivemindWorld]:
    world = HivemindWorld()
    yield world
    await world.close()


async def fetched(peer: Any, key: str, within: float) -> dict[str, bytes]:
    """What a peer finds under a key, as soon as it finds anything."""
    found: dict[str, bytes] = {}

    async def finds() -> bool:
        with contextlib.suppress(NoContactError):
            found.update((await peer.fetch([key])).get(key, {}))
        return bool(found)

    await eventually(finds, f"a record under {key!r}", within=within)
    return found


@pytest.mark.timeout(90)
async def test_a_killed_daemon_is_replaced_under_the_same_identity_and_address(world: HivemindWorld) -> None:
    first: Any = await world.peer()
    other = await world.peer()
    await first.listen("echo", echo)
    address, peer_id = tuple(first.addresses), first.peer_id
    os.kill(first.daemon_pid, signal.SIGKILL)
    streams: list[Stream] = []

    async def reaches() -> bool:
        with contextlib.suppress(SwarmkitError):
            streams.append(await other.open(peer_id, "echo", address))
        return bool(streams)

    await eventually(reaches, "a stream to the peer whose daemon was killed")
    (stream,) = streams
    await stream.send(b"again")
    assert await stream.receive() == b"again"


@pytest.mark.timeout(90)
async def test_a_peer_whose_own_daemon_was_killed_finds_records_again(world: HivemindWorld) -> None:
    first, other = await world.peer(), await world.peer()
    await first.store([("k", b"v")], time.time() + 80)
    os.kill(other.daemon_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    assert await fetched(other, "k", 60) == {first.peer_id: b"v"}


@pytest.mark.timeout(60)
async def test_a_look_up_that_no_peer_answers_says_so(world: HivemindWorld) -> None:
    first, other = await world.peer(), await world.peer(client_mode=True)
    first.kill()  # type: ignore[attr-defined]
    with pytest.raises(NoContactError, match="no other peer of the swarm answers"):
        await other.fetch(["k"])


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_client_is_in_contact_again_after_an_outage_that_emptied_its_routing_table(
    world: HivemindWorld,
) -> None:
    first: Any = await world.peer()
    client = await world.peer(client_mode=True)
    await first.store([("k", b"v")], time.time() + 110)
    os.kill(first.daemon_pid, signal.SIGSTOP)
    try:
        with pytest.raises(NoContactError):
            await client.fetch(["k"])
        await asyncio.sleep(12)
    finally:
        os.kill(first.daemon_pid, signal.SIGCONT)
    assert await fetched(client, "k", 45) == {first.peer_id: b"v"}


@pytest.mark.slow
@pytest.mark.timeout(90)
async def test_a_peer_that_lost_all_others_meets_one_that_dialled_it_since(world: HivemindWorld) -> None:
    first: Any = await world.peer()
    newcomer: Any = await world.peer()
    await newcomer.store([("k", b"v")], time.time() + 80)
    table = first.table.node.protocol.routing_table
    table.__init__(table.node_id, table.bucket_size, table.depth_modulo)  # it knows nobody any more
    with pytest.raises(NoContactError):
        await first.fetch(["k"])
    assert await fetched(first, "k", 30) == {newcomer.peer_id: b"v"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("silent", "given_up"), [(False, 0), (True, 1)], ids=["refuses", "is silent"])
async def test_only_a_connection_to_a_peer_that_is_silent_is_given_up(
    world: HivemindWorld, monkeypatch: pytest.MonkeyPatch, silent: bool, given_up: int
) -> None:
    await world.peer()
    clock = SetClock()
    other: Any = await world.peer(clock=clock)
    disconnected: list[str] = []

    async def meet(peer_id: str) -> bool:
        clock.seconds += 3.0 if silent else 0.1
        return False

    async def disconnect(peer_id: str) -> None:
        disconnected.append(peer_id)

    monkeypatch.setattr(other.table, "meet", meet)
    monkeypatch.setattr(other, "disconnect", disconnect)
    assert not await other.rejoin()
    assert len(disconnected) == given_up


async def test_a_peer_joins_by_one_whose_daemon_is_just_starting_again(world: HivemindWorld) -> None:
    first: Any = await world.peer()
    await first.store([("k", b"v")], time.time() + 110)
    os.kill(first.daemon_pid, signal.SIGKILL)
    newcomer = await world.peer()
    assert await fetched(newcomer, "k", 30) == {first.peer_id: b"v"}


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_peer_that_lost_all_others_does_not_cut_off_one_that_joins_by_it(
    world: HivemindWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause_s = 8.0
    first: Any = await world.peer()
    left: Any = await world.peer()
    monkeypatch.setattr(Contact, "next_pause_s", lambda _: pause_s if left.holds_back else 0.5)
    world.kill(first)
    table = left.table.node.protocol.routing_table
    table.__init__(table.node_id, table.bucket_size, table.depth_modulo)  # it knows nobody any more
    daemon = left.daemon_pid
    await eventually(lambda: left.holds_back, "its daemon dials the one that has gone no more", within=60)
    world.peers.reverse()  # the next one joins by the one that is left
    await world.peer()
    await asyncio.sleep(pause_s + 2)
    assert left.daemon_pid == daemon
