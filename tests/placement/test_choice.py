"""Our own rule: where a newcomer serves, and when a server moves."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from swarmkit.errors import UsageError
from swarmkit.placement.choice import PlacementPolicy, choose, reserved_sessions, should_move
from swarmkit.placement.description import Demand, Machine, ModelSize, Served, served_by
from swarmkit.placement.supply import greatest_rate, greatest_rate_of_any

MODEL = ModelSize(num_blocks=8, block_bytes=100, token_bytes=1)
MACHINE = Machine(name="me", memory_bytes=500, decode_s=0.01, token_s=0.01, way_s=0.02)


def test_a_newcomer_fills_a_hole() -> None:
    assert choose(MACHINE, [Served(0, 2, 9.0), Served(5, 8, 9.0)], MODEL, count=3) == (2, 5)


def test_a_newcomer_strengthens_the_weakest_block() -> None:
    assert choose(MACHINE, [Served(0, 4, 30.0), Served(4, 8, 20.0)], MODEL, count=4) == (4, 8)


def test_where_the_demand_is_met_a_newcomer_makes_the_best_route_faster() -> None:
    demand = Demand(arrivals_per_s=0.01, prompt_tokens=1, answer_tokens=10)
    others = [
        Served(0, 4, 100.0, decode_s=0.01, way_s=0.02),
        Served(4, 8, 50.0, decode_s=0.05, way_s=0.02),
        Served(4, 8, 90.0, decode_s=0.05, way_s=0.02),
    ]
    assert choose(MACHINE, others, MODEL, demand, count=4) == (4, 8)


def test_a_newcomer_leaves_room_for_the_sessions_that_are_expected() -> None:
    """The more often requests come, the more sessions are open, and the fewer blocks leave them room."""
    counts = []
    for arrivals_per_s in (0.01, 20.0, 200.0):
        demand = Demand(arrivals_per_s=arrivals_per_s, prompt_tokens=10, answer_tokens=10)
        others = [Served(0, 8, 100.0, decode_s=0.02)]
        start, stop = choose(replace(MACHINE, memory_bytes=900, token_s=1e-4), others, MODEL, demand)
        counts.append(stop - start)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


NARROW = replace(MACHINE, memory_bytes=860, token_s=1e-4)
"""Holds seven blocks beside the cache of one session of 20 tokens, or fewer beside those of many."""
OFTEN = Demand(arrivals_per_s=5.0, prompt_tokens=10, answer_tokens=10)
WITHOUT_THE_LAST = Served(0, 7, 1000.0, decode_s=0.01, way_s=0.02)


def test_a_newcomer_fills_a_hole_with_room_for_more_than_one_session() -> None:
    start, stop = choose(NARROW, [WITHOUT_THE_LAST], MODEL, OFTEN)
    assert stop == 8
    assert stop - start < 7


def test_the_only_server_of_a_block_gives_up_no_room_for_sessions() -> None:
    own = served_by(NARROW, 6, 8, MODEL)
    assert should_move(NARROW, own, [WITHOUT_THE_LAST], MODEL, OFTEN, move_s=1.0) is None


def test_the_first_servers_cover_the_model_rather_than_reserve_cache() -> None:
    demand = Demand(arrivals_per_s=50.0, prompt_tokens=10, answer_tokens=10)
    first = choose(MACHINE, [], MODEL, demand)
    second = choose(MACHINE, [served_by(MACHINE, *first, MODEL)], MODEL, demand)
    assert (first, second) == ((0, 4), (4, 8))


def test_a_machine_into_which_nothing_fits_is_told_so() -> None:
    with pytest.raises(UsageError, match="not one block fits"):
        choose(replace(MACHINE, memory_bytes=99), [], MODEL)


def test_a_server_reserves_no_more_sessions_than_it_has_work_for() -> None:
    demand = Demand(arrivals_per_s=100.0, prompt_tokens=10, answer_tokens=10)
    assert reserved_sessions(MACHINE, 4, demand, PlacementPolicy(), token_s=0.12) == 3


# moving


def served(start: int, stop: int, throughput: float) -> Served:
    return Served(start, stop, throughput, decode_s=0.01, way_s=0.02)


def test_the_only_server_of_a_block_stays() -> None:
    others = [served(0, 4, 1.0)]
    assert should_move(MACHINE, served(4, 8, 25.0), others, MODEL, count=4) is None


def test_a_server_moves_to_blocks_that_nobody_serves() -> None:
    move = should_move(MACHINE, served(0, 4, 25.0), [served(0, 4, 25.0)], MODEL, count=4)
    assert move is not None
    assert (move.start, move.stop) == (4, 8)


def test_a_server_moves_to_where_it_makes_the_swarm_much_better() -> None:
    others = [served(0, 4, 25.0), served(0, 4, 25.0), served(4, 8, 25.0)]
    move = should_move(MACHINE, served(0, 4, 25.0), others, MODEL, count=4)
    assert move is not None
    assert (move.start, move.stop) == (4, 8)
    assert move.gain > 1.2


def test_nobody_moves_for_a_small_gain() -> None:
    others = [served(0, 4, 25.0), served(4, 8, 46.0)]
    assert should_move(MACHINE, served(0, 4, 25.0), others, MODEL, count=4) is None


def test_nobody_moves_for_less_than_it_costs() -> None:
    others = [served(0, 4, 25.0), served(0, 4, 25.0), served(4, 8, 25.0)]
    policy = PlacementPolicy(horizon_s=100.0)
    assert (
        should_move(MACHINE, served(0, 4, 25.0), others, MODEL, policy=policy, move_s=50.0, count=4) is None
    )


def test_a_hundred_servers_with_noisy_measurements_settle() -> None:
    """Each looks at the others now and then, and measures every speed 10 % wrong or so."""
    model = ModelSize(num_blocks=40, block_bytes=100, token_bytes=0.01)
    chance = random.Random(5)
    machines = [
        Machine(
            name=str(number),
            memory_bytes=chance.choice((400, 800, 1600)),
            decode_s=(each := chance.choice((0.001, 0.002, 0.004))),
            token_s=each,
            way_s=0.02,
        )
        for number in range(100)
    ]

    def noisy(one: Served) -> Served:
        return replace(one, throughput=one.throughput * chance.gauss(1, 0.1))

    # All choose at the same time, and so the same blocks.
    placed = [served_by(one, *choose(one, [], model), model) for one in machines]
    moves = []
    for _ in range(6):
        moved = 0
        for own in chance.sample(range(100), 100):
            others = [noisy(one) for number, one in enumerate(placed) if number != own]
            move = should_move(machines[own], noisy(placed[own]), others, model, count=placed[own].blocks)
            if move is not None:
                placed[own] = served_by(machines[own], move.start, move.stop, model)
                moved += 1
        moves.append(moved)
    assert moves[0] > 0
    assert moves[-2:] == [0, 0]
    bound = greatest_rate_of_any(40, [(one.blocks, one.throughput * one.blocks) for one in placed])
    assert greatest_rate(40, placed) >= 0.9 * bound
