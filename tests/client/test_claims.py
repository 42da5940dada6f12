"""What a server's word about its speed is worth, and which servers are tried and looked at."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import pytest

from swarmkit.client.routing.candidates import MOST_FOR_A_BLOCK, best_of_each_block, within_bounds
from swarmkit.client.routing.claims import Shown, believed_s, best_per_block, is_promising
from swarmkit.client.routing.route import Cost, find_route, route_cost
from swarmkit.client.routing.trials import order_of_trials, patience_s, rounds
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.swarm_map import SwarmMap

from ..net.announcements import announcement

WAY_S = 0.02


def server(name: str, start: int = 0, stop: int = 6, **changes: Any) -> Announcement:
    return announcement(peer_id=name, public_name=name, start=start, stop=stop, **changes)


def cost(**shown: Shown) -> Cost:
    return route_cost(
        round_trip_s=lambda peer: WAY_S,
        penalty_s=lambda peer: 0.0,
        shown=shown.get,
        best_s=best_per_block(shown.values()),
    )


def chosen(*servers: Announcement, **shown: Shown) -> str:
    (hop,) = find_route(0, 6, servers, cost(**shown))
    return hop.server.peer_id


def test_a_claim_is_believed_while_no_server_has_shown_anything() -> None:
    assert believed_s(0.03, 0.01, 6, None, 0.0) == 0.03


@pytest.mark.parametrize("claimed_s", [0.0, 0.03, 0.1])
def test_a_claim_is_worth_less_than_what_the_best_has_shown(claimed_s: float) -> None:
    assert believed_s(claimed_s, 0.0, 6, None, best_per_block([Shown(0.12, 6)])) > 0.12


def test_a_claim_to_be_slow_is_believed() -> None:
    assert believed_s(9.0, 9.0, 6, None, best_per_block([Shown(0.12, 6)])) >= 9.0


def test_what_a_server_has_shown_counts_and_not_its_claim() -> None:
    assert believed_s(9.0, 9.0, 6, Shown(0.12, 6), 0.02) == 0.12


def test_what_was_shown_with_fewer_blocks_takes_longer_with_more() -> None:
    assert believed_s(0.1, 0.1, 6, Shown(0.12, 3), 0.02) == pytest.approx(0.24)


def test_a_server_that_is_far_slower_than_it_claims_counts_as_slower_than_it_is() -> None:
    assert believed_s(0.02, 1e-12, 6, Shown(0.12, 6, way_s=0.02), 0.02) > 0.12


def test_a_server_that_is_only_far_away_has_kept_its_word() -> None:
    assert believed_s(0.02, 0.01, 6, Shown(0.32, 6, way_s=0.3), 0.02) == 0.32


def test_a_server_that_has_worked_is_used_before_fifty_that_claim_everything() -> None:
    boasters = [server(f"boaster-{number}", throughput=1e12) for number in range(50)]
    assert chosen(*boasters, server("honest"), honest=Shown(0.3, 6)) == "honest"


def test_a_server_that_claims_everything_and_is_slow_is_left_for_one_that_is_faster() -> None:
    servers = server("boaster", throughput=1e12), server("honest")
    assert chosen(*servers, boaster=Shown(0.5, 6), honest=Shown(0.1, 6)) == "honest"


@pytest.mark.parametrize(("claimed_s", "tried"), [(0.1, False), (0.06, False), (0.04, True)])
def test_a_claim_is_tried_out_if_it_promises_twice_the_speed(claimed_s: float, tried: bool) -> None:
    assert is_promising(claimed_s, 0.1) is tried


# trials


def test_more_servers_are_tried_in_each_round() -> None:
    assert list(islice(rounds(), 8)) == [2, 4, 8, 16, 32, 64, 64, 64]


def test_a_server_is_waited_for_as_long_as_it_claims_to_take() -> None:
    assert patience_s(1.25, 100, 10.0) == 11.25


def test_each_server_is_tried_once() -> None:
    servers = [server(f"server-{number}", throughput=number) for number in range(20)]
    order = order_of_trials(servers, "salt")
    assert sorted(each.peer_id for each in order) == sorted(each.peer_id for each in servers)


def test_one_of_the_first_two_to_be_tried_is_the_one_that_claims_most() -> None:
    servers = [server(f"server-{number}", throughput=number) for number in range(20)]
    assert "server-19" in {each.peer_id for each in order_of_trials(servers, "salt")[:2]}


def test_claims_keep_no_server_from_being_tried_for_long() -> None:
    boasters = [server(f"boaster-{number}", throughput=1e12) for number in range(50)]
    places = []
    for client in range(200):
        order = order_of_trials([*boasters, server("honest")], salt=str(client))
        places.append([each.peer_id for each in order].index("honest"))
    assert sum(places) / len(places) < 40


# a flood of announcements


def flood(number: int, blocks: int) -> list[Announcement]:
    return [
        server(f"flood-{at}", at % blocks, at % blocks + 1 + at % (blocks - at % blocks), throughput=1e12)
        for at in range(number)
    ]


def test_a_few_servers_are_all_looked_at() -> None:
    servers = flood(MOST_FOR_A_BLOCK, 6)
    assert list(best_of_each_block(0, 6, servers, cost(), "")) == servers


def test_of_a_flood_only_some_are_looked_at_for_each_block() -> None:
    kept = best_of_each_block(0, 6, flood(10_000, 6), cost(), "")
    assert len(kept) <= 6 * MOST_FOR_A_BLOCK


def view_of(servers: list[Announcement]) -> SwarmMap:
    return SwarmMap().apply(*servers)


def test_a_view_of_a_few_servers_stays_as_it_is() -> None:
    view = view_of(flood(20, 6))
    assert within_bounds(view, (), random.Random(1), most=20) is view


def test_of_a_flood_a_view_keeps_so_many() -> None:
    assert len(within_bounds(view_of(flood(500, 6)), (), random.Random(1), most=100).announcements) == 100


def test_a_view_keeps_in_a_flood_what_was_used() -> None:
    view = within_bounds(view_of([*flood(500, 6), server("used")]), {"used"}, random.Random(1), most=100)
    assert "used" in view.announcements


def test_a_flood_over_some_blocks_leaves_a_view_the_servers_of_others() -> None:
    servers = [*flood(500, 6), server("only", 6, 8)]
    assert "only" in within_bounds(view_of(servers), (), random.Random(1), most=100).announcements


def test_another_part_of_a_flood_is_kept_each_time() -> None:
    view, chance = view_of(flood(500, 6)), random.Random(1)
    assert within_bounds(view, (), chance, most=100) != within_bounds(view, (), chance, most=100)


def test_of_a_flood_every_block_keeps_a_server() -> None:
    kept = best_of_each_block(0, 80, flood(10_000, 80), cost(), "")
    assert {block for each in kept for block in range(each.start, each.stop)} == set(range(80))


def test_the_only_server_of_a_block_is_kept_in_a_flood() -> None:
    servers = [*flood(10_000, 6), server("only", 6, 8)]
    assert "only" in {each.peer_id for each in best_of_each_block(0, 8, servers, cost(), "")}


def test_a_server_that_has_worked_is_kept_in_a_flood() -> None:
    servers = [*(server(f"flood-{at}", throughput=1e12) for at in range(10_000)), server("honest")]
    kept = best_of_each_block(0, 6, servers, cost(honest=Shown(0.3, 6)), "")
    assert "honest" in {each.peer_id for each in kept}
