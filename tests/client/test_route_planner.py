"""What a client has seen of servers decides how it plans; the search itself is in `test_routing.py`."""

from __future__ import annotations

import pytest

from swarmkit.client.routing.bans import Bans
from swarmkit.client.routing.busy import BusyPeers
from swarmkit.client.swarm.route_planner import RoutePlanner
from swarmkit.errors import PeerUnreachableError
from swarmkit.events import EventStream, StepFinished
from swarmkit.net.registry.records import Announcement

from ..clocks import SetClock
from ..net.announcements import announcement

ONE, OTHER = announcement(0), announcement(1)


class World:
    """A client that knows two servers of blocks 2:4, and nothing else of them."""

    def __init__(self) -> None:
        self.clock = SetClock()
        self.bans = Bans(2.0, 60.0, self.clock.now)
        self.busy = BusyPeers(self.clock.now)
        self.pushes = True
        self.routes = RoutePlanner(
            servers=lambda hosted_adapter: [ONE, OTHER],
            may_push=lambda: self.pushes,
            bans=self.bans,
            busy=self.busy,
            events=EventStream(apart={StepFinished: 8}),
            times={},
            clock=self.clock,
        )

    def choice(self) -> Announcement:
        (hop,) = self.routes.plan(2, 4)
        return hop.server

    def other_than(self, server: Announcement) -> Announcement:
        return OTHER if server.service_id == ONE.service_id else ONE


@pytest.fixture
def world() -> World:
    return World()


def test_the_same_server_is_chosen_each_time(world: World) -> None:
    assert len({world.choice().service_id for _ in range(10)}) == 1


def test_another_server_is_chosen_while_one_is_banned(world: World) -> None:
    first = world.choice()
    world.bans.failed(first.service_id)
    assert world.choice() == world.other_than(first)


def test_another_server_is_chosen_while_one_may_be_gone(world: World) -> None:
    first = world.choice()
    world.clock.seconds += world.bans.failed(first.service_id, error=PeerUnreachableError("gone"))
    assert world.choice() == world.other_than(first)


def test_a_server_that_is_farther_away_costs_more(world: World) -> None:
    first = world.choice()
    world.routes.times_of(first).way_s = 1.0
    assert world.choice() == world.other_than(first)


def test_servers_that_cannot_link_are_tried_again_after_a_while(world: World) -> None:
    world.routes.cannot_link(ONE, OTHER)
    assert not world.routes.may_link(ONE, OTHER)
    assert world.routes.may_link(OTHER, ONE)
    world.clock.seconds += 600.0
    assert world.routes.may_link(ONE, OTHER)


def test_no_servers_link_where_the_user_has_none_push(world: World) -> None:
    world.pushes = False
    assert not world.routes.may_link(ONE, OTHER)
