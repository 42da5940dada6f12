"""Which servers run which blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.client.routing.bans import PENALTY_S, Bans
from swarmkit.client.routing.route import Cost, Hop, find_route, route_cost
from swarmkit.errors import NoRouteError
from swarmkit.net.registry.records import Announcement

from ..net.announcements import announcement


def server(name: str, start: int, stop: int, **changes: Any) -> Announcement:
    return announcement(peer_id=name, public_name=name, start=start, stop=stop, **changes)


def by_blocks(server: Announcement, start: int, stop: int) -> float:
    """One second to get to a server, one for each block."""
    return 1.0 + stop - start


def route(start: int, stop: int, *servers: Announcement, cost: Cost = by_blocks) -> list[str]:
    return [str(hop) for hop in find_route(start, stop, servers, cost)]


def usual_cost(**changes: Any) -> Cost:
    parts: dict[str, Any] = {"round_trip_s": lambda peer: 0.02, "penalty_s": lambda peer: 0.0}
    return route_cost(**{**parts, **changes})


# shapes


def test_one_server_of_everything_is_a_route() -> None:
    assert route(0, 6, server("a", 0, 6)) == ["a [0:6]"]


def test_servers_are_chained_in_the_order_of_blocks() -> None:
    assert route(0, 6, server("b", 2, 6), server("a", 0, 2)) == ["a [0:2]", "b [2:6]"]


def test_a_server_may_be_used_for_a_part_of_what_it_holds() -> None:
    assert route(1, 3, server("a", 0, 6)) == ["a [1:3]"]


def test_where_servers_overlap_no_block_is_run_twice() -> None:
    blocks = [
        (hop.start, hop.stop) for hop in find_route(0, 6, [server("a", 0, 4), server("b", 2, 6)], by_blocks)
    ]
    assert blocks in ([(0, 4), (4, 6)], [(0, 2), (2, 6)])


def test_a_server_may_be_used_twice_around_a_better_one() -> None:
    def cost(server: Announcement, start: int, stop: int) -> float:
        return (stop - start) * (1.0 if server.peer_id == "fast" else 100.0)

    assert route(0, 6, server("slow", 0, 6), server("fast", 2, 4), cost=cost) == [
        "slow [0:2]",
        "fast [2:4]",
        "slow [4:6]",
    ]


def test_no_blocks_need_no_server() -> None:
    assert route(3, 3, server("a", 0, 6)) == []


# choice


def test_fewer_hops_are_better() -> None:
    assert route(0, 4, server("a", 0, 2), server("b", 2, 4), server("c", 0, 4)) == ["c [0:4]"]


def test_the_faster_server_is_chosen() -> None:
    servers = [server("slow", 0, 6, throughput=1.0), server("fast", 0, 6, throughput=9.0)]
    assert route(0, 6, *servers, cost=usual_cost()) == ["fast [0:6]"]


def test_the_nearer_server_is_chosen() -> None:
    servers = [server("far", 0, 6), server("near", 0, 6)]
    cost = usual_cost(round_trip_s=lambda peer: 1.0 if peer == "far" else 0.01)
    assert route(0, 6, *servers, cost=cost) == ["near [0:6]"]


def test_a_server_with_a_full_cache_is_chosen_last() -> None:
    servers = [server("full", 0, 6, free_cache_tokens=0, throughput=99.0), server("free", 0, 6)]
    assert route(0, 6, *servers, cost=usual_cost()) == ["free [0:6]"]


def test_work_is_counted_by_the_part_that_is_used() -> None:
    cost = usual_cost(round_trip_s=lambda peer: 0.0)
    whole = cost(server("a", 0, 6), 0, 6)
    assert cost(server("a", 0, 6), 0, 3) == pytest.approx(whole / 2)


def test_a_server_that_claims_to_do_nothing_has_a_cost_like_others() -> None:
    assert 0 < usual_cost()(server("a", 0, 6, throughput=0.0), 0, 6) < PENALTY_S


def test_equal_servers_are_shared_among_clients() -> None:
    servers = [server("a", 0, 6), server("b", 0, 6)]
    chosen = {tuple(route(0, 6, *servers, cost=usual_cost(salt=str(client)))) for client in range(32)}
    assert chosen == {("a [0:6]",), ("b [0:6]",)}


def test_one_client_chooses_the_same_way_whatever_the_order() -> None:
    servers = [server(name, 0, 6) for name in "abcd"]
    routes = {
        tuple(route(0, 6, *order, cost=usual_cost(salt="x"))) for order in itertools.permutations(servers)
    }
    assert len(routes) == 1


# peers that failed


def penalised(*names: str) -> Cost:
    bans = Bans(2.0, 60.0, clock=lambda: 0.0)
    for name in names:
        bans.failed(name)
    return usual_cost(penalty_s=bans.penalty_s)


def test_a_peer_that_failed_is_not_used_however_good_it_is() -> None:
    servers = [server("good", 0, 6, throughput=1e6), server("poor", 0, 6, throughput=0.01)]
    assert route(0, 6, *servers, cost=penalised("good")) == ["poor [0:6]"]


def test_a_peer_that_failed_is_used_for_what_nobody_else_has() -> None:
    servers = [server("failed", 0, 6), server("other", 0, 4)]
    assert route(0, 6, *servers, cost=penalised("failed")) == ["other [0:4]", "failed [4:6]"]


def test_long_detours_are_better_than_a_peer_that_failed() -> None:
    servers = [server("failed", 0, 6), *(server(str(block), block, block + 1) for block in range(6))]
    assert len(route(0, 6, *servers, cost=penalised("failed"))) == 6


def test_two_that_failed_are_better_avoided_one_by_one() -> None:
    servers = [server("x", 0, 3), server("y", 3, 6), server("z", 0, 6)]
    assert route(0, 6, *servers, cost=penalised("x", "y", "z")) == ["z [0:6]"]


# none


@pytest.mark.parametrize(
    ("servers", "missing"),
    [
        ([], ((0, 6),)),
        ([(0, 2)], ((2, 6),)),
        ([(2, 4)], ((0, 2), (4, 6))),
        ([(0, 2), (3, 6)], ((2, 3),)),
    ],
)
def test_the_error_names_the_blocks_that_are_missing(
    servers: list[tuple[int, int]], missing: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(NoRouteError) as caught:
        route(0, 6, *(server("a", low, high) for low, high in servers))
    assert caught.value.missing == missing
    assert all(f"{low}:{high}" in str(caught.value) for low, high in missing)


def test_the_error_says_what_to_do() -> None:
    with pytest.raises(NoRouteError, match=r"--blocks 2:6 --join ADDRESS.*route_timeout"):
        route(0, 6, server("a", 0, 2))


def test_blocks_outside_the_wanted_ones_are_not_missed() -> None:
    with pytest.raises(NoRouteError) as caught:
        route(2, 4, server("a", 0, 3))
    assert caught.value.missing == ((3, 4),)


# against all routes there are


def every_route(start: int, stop: int, servers: Sequence[Announcement]) -> list[list[Hop]]:
    if start == stop:
        return [[]]
    return [
        [Hop(server, start, high), *rest]
        for server in servers
        if server.start <= start < server.stop
        for high in range(start + 1, min(server.stop, stop) + 1)
        for rest in every_route(high, stop, servers)
    ]


ranges = st.tuples(st.integers(0, 4), st.integers(1, 5)).filter(lambda pair: pair[0] < pair[1])


@given(st.lists(ranges, max_size=4), st.lists(st.integers(1, 9), min_size=8, max_size=8))
def test_no_route_is_cheaper_than_the_one_that_is_found(
    pairs: list[tuple[int, int]], prices: list[int]
) -> None:
    servers = [server(str(number), low, high) for number, (low, high) in enumerate(pairs)]

    def cost(server: Announcement, start: int, stop: int) -> float:
        number = int(server.peer_id)
        return prices[number] + prices[number + 4] * (stop - start)  # to get there, and for each block

    def total(hops: list[Hop]) -> float:
        return sum(cost(hop.server, hop.start, hop.stop) for hop in hops)

    routes = every_route(0, 5, servers)
    if not routes:
        with pytest.raises(NoRouteError):
            find_route(0, 5, servers, cost)
        return
    found = find_route(0, 5, servers, cost)
    assert found in routes
    assert total(found) == min(map(total, routes))


# servers that are far from each other


def test_a_server_that_is_far_from_the_one_before_is_not_chosen() -> None:
    servers = [server("a", 0, 3), server("near", 3, 6), server("far", 3, 6)]
    assert [hop.server.peer_id for hop in find_route(0, 6, servers, by_blocks, {("a", "near"): 1.0})][
        1
    ] == "far"


def test_the_first_of_two_is_chosen_by_the_way_that_follows() -> None:
    servers = [server("a", 0, 3), server("b", 0, 3), server("end", 3, 6)]
    found = find_route(0, 6, servers, by_blocks, {("a", "end"): 5.0})
    assert [hop.server.peer_id for hop in found] == ["b", "end"]


@given(
    st.lists(ranges, max_size=4),
    st.lists(st.integers(1, 9), min_size=8, max_size=8),
    st.lists(st.integers(0, 9), min_size=16, max_size=16),
)
def test_no_route_is_cheaper_where_ways_between_servers_count(
    pairs: list[tuple[int, int]], prices: list[int], ways: list[int]
) -> None:
    servers = [server(str(number), low, high) for number, (low, high) in enumerate(pairs)]
    longer = {(str(at // 4), str(at % 4)): float(way) for at, way in enumerate(ways) if at // 4 != at % 4}

    def cost(server: Announcement, start: int, stop: int) -> float:
        number = int(server.peer_id)
        return prices[number] + prices[number + 4] * (stop - start)

    def total(hops: list[Hop]) -> float:
        passed = sum(
            longer.get((a.server.peer_id, b.server.peer_id), 0.0) for a, b in itertools.pairwise(hops)
        )
        return passed + sum(cost(hop.server, hop.start, hop.stop) for hop in hops)

    if routes := every_route(0, 5, servers):
        assert total(find_route(0, 5, servers, cost, longer)) == min(map(total, routes))


def test_a_server_at_which_steps_wait_is_chosen_last() -> None:
    servers = [server("crowded", 0, 6, throughput=99.0, expected_wait_s=5.0), server("free", 0, 6)]
    assert route(0, 6, *servers, cost=usual_cost()) == ["free [0:6]"]
