"""Connections that are not served yet, and who gives way when there are too many of them."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from swarmkit.errors import ProtocolError
from swarmkit.net.hivemind.entrance import Entrance
from swarmkit.net.hivemind.framing import FrameStream
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
