"""The time of the best route, compared with the clients' own search."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.client.routing.route import find_route
from swarmkit.errors import NoRouteError
from swarmkit.net.registry.records import Announcement
from swarmkit.placement.description import Served
from swarmkit.placement.latency import RouteTimes

from ..net.announcements import announcement

BLOCKS = 6
spans = st.tuples(
    st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.floats(0.01, 1.0), st.floats(0.0, 1.0)
).map(lambda one: Served(one[0], min(BLOCKS, one[0] + one[1]), 1.0, "", one[2], one[3]))


def by_clients(servers: list[Served]) -> float:
    """Seconds of the route that a client finds."""
    records = [
        announcement(peer_id=str(n), num_blocks=BLOCKS, start=one.start, stop=one.stop)
        for n, one in enumerate(servers)
    ]

    def cost(record: Announcement, start: int, stop: int) -> float:
        one = servers[int(record.peer_id)]
        return one.way_s + (stop - start) * one.block_s

    try:
        return sum(cost(hop.server, hop.start, hop.stop) for hop in find_route(0, BLOCKS, records, cost))
    except NoRouteError:
        return math.inf


@given(st.lists(spans, max_size=5))
def test_the_best_route_is_the_one_that_clients_find(servers: list[Served]) -> None:
    times = RouteTimes(BLOCKS, servers)
    assert times.seconds == pytest.approx(by_clients(servers))
    assert times.beyond[0] == pytest.approx(times.seconds)


@given(st.lists(spans, max_size=4), st.integers(1, BLOCKS), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_one_server_more_is_looked_at_at_every_place(
    servers: list[Served], count: int, block_s: float, way_s: float
) -> None:
    times = RouteTimes(BLOCKS, servers)
    found = times.with_one_more(count, way_s, block_s)

    def with_a_visit(start: int) -> float:
        parts = [(low, high) for high in range(start + 1, start + count + 1) for low in range(start, high)]
        return min(
            float(times.to[low] + way_s + (high - low) * block_s + times.beyond[high]) for low, high in parts
        )

    wanted = [min(times.seconds, with_a_visit(start)) for start in range(BLOCKS - count + 1)]
    assert list(found) == pytest.approx(wanted)


@given(st.lists(spans, max_size=4), st.integers(1, BLOCKS), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_one_server_more_is_never_promised_to_be_faster_than_it_is(
    servers: list[Served], count: int, block_s: float, way_s: float
) -> None:
    found = RouteTimes(BLOCKS, servers).with_one_more(count, way_s, block_s)
    best = [
        RouteTimes(BLOCKS, [*servers, Served(start, start + count, 1.0, "", block_s, way_s)]).seconds
        for start in range(BLOCKS - count + 1)
    ]
    assert all(one >= other - 1e-9 for one, other in zip(found, best, strict=True))
