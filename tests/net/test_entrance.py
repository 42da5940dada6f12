"""Connections that are not served yet, and who gives way when there are too many of them."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from swarmkit.errors import ProtocolError
from swarmkit.net.hivemind.entrance import Entrance, StreamGate
from swarmkit.net.hivemind.framing import FrameStream
from swarmkit.net.transport.rates import TokenBucket
from swarmkit.net.transport.shares import Holder

CAPACITY = 4
STRANGER, OTHER, CLIENT = Holder("a", "1"), Holder("b", "1"), Holder("c", "1")


class Door:
    """An entrance, and those that wait at it."""

    def __init__(self, *holders: Holder) -> None:
        self.entrance = Entrance(CAPACITY)
        self._inside = ExitStack()
        self.streams = [self.comes(holder) for holder in holders]

    def comes(self, holder: Holder) -> FrameStream:
        stream = FrameStream()
        self._inside.enter_context(self.entrance.holds(stream, holder))
        return stream

    def goes(self) -> None:
        """All of them."""
        self._inside.close()

    @property
    def ended(self) -> list[int]:
        return [number for number, stream in enumerate(self.streams) if stream.has_ended]


def test_one_may_have_all_places() -> None:
    assert Door(*[STRANGER] * CAPACITY).ended == []


def test_who_holds_too_many_gives_way_with_what_waits_longest() -> None:
    door = Door(OTHER, *[STRANGER] * (CAPACITY - 1))
    assert not door.comes(CLIENT).has_ended
    assert door.ended == [1]


def test_a_newcomer_takes_the_place_of_an_older_one_of_its_own() -> None:
    door = Door(*[STRANGER] * CAPACITY)
    door.comes(STRANGER)
    assert door.ended == [0]


def test_nobody_gives_way_who_has_no_more_than_its_share() -> None:
    door = Door(*[STRANGER] * 2, *[OTHER] * 2)
    door.comes(CLIENT)  # of three, the share is more than one
    with pytest.raises(ProtocolError, match="too many"):
        Door(*(Holder(host, "1") for host in "wxyz")).comes(CLIENT)


def test_places_are_given_back() -> None:
    door = Door(*[STRANGER] * CAPACITY)
    door.goes()
    assert len(door.entrance) == 0


# one after the other


async def let_through(*holders: Holder, burst: int = 1, ended: Holder | None = None) -> list[Holder]:
    """In which order connections of these are let through that all come at once."""
    gate, order = StreamGate(TokenBucket(per_second=500, burst=burst)), []

    async def comes(holder: Holder) -> None:
        stream = FrameStream()
        if holder == ended:
            stream.close()
        await gate.turn(stream, holder)
        order.append(holder)

    await asyncio.gather(*map(comes, holders), return_exceptions=True)
    return order


@pytest.mark.asyncio
async def test_who_comes_with_one_connection_does_not_wait_for_all_of_a_strangers() -> None:
    order = await let_through(*[STRANGER] * 20, CLIENT)
    assert (len(order), order.index(CLIENT) <= 2) == (21, True)


@pytest.mark.asyncio
async def test_many_peers_of_a_host_have_no_more_turns_than_one_of_another() -> None:
    crowd = [Holder("a", str(number)) for number in range(20)]
    order = await let_through(*crowd, CLIENT, CLIENT)
    assert max(index for index, one in enumerate(order) if one == CLIENT) <= 4


@pytest.mark.asyncio
async def test_a_connection_that_ended_while_it_waited_takes_nobodys_turn() -> None:
    order = await let_through(CLIENT, *[STRANGER] * 20, OTHER, ended=STRANGER)
    assert order == [CLIENT, OTHER]


@pytest.mark.asyncio
async def test_who_gives_up_while_he_waits_holds_up_nobody() -> None:
    gate, streams = StreamGate(TokenBucket(per_second=500, burst=1)), [FrameStream() for _ in range(4)]
    first, second, third, last = [asyncio.create_task(gate.turn(stream, CLIENT)) for stream in streams]
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait_for(asyncio.gather(first, third, last), 5)
