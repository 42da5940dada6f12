"""How many tokens per second placements carry, compared with what linear programming says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from swarmkit.placement.description import Demand, Machine, ModelSize, Served, blocks_that_fit, cache_tokens
from swarmkit.placement.supply import (
    greatest_rate,
    greatest_rate_of_any,
    session_throughputs,
)

BLOCKS = 8


def by_linear_programming(num_blocks: int, servers: Sequence[Served]) -> float:
    """The greatest rate T with T units of work for each block, from servers that hold it."""
    pairs = [(i, block) for i, one in enumerate(servers) for block in range(one.start, one.stop)]
    of_blocks = np.zeros((num_blocks, len(pairs) + 1))
    of_servers = np.zeros((len(servers), len(pairs) + 1))
    of_blocks[:, -1] = 1.0
    for column, (i, block) in enumerate(pairs):
        of_blocks[block, column] = -1.0
        of_servers[i, column] = 1.0
    limits = [0.0] * num_blocks + [one.throughput * one.blocks for one in servers]
    goal = np.zeros(len(pairs) + 1)
    goal[-1] = -1.0
    found = linprog(goal, A_ub=np.vstack([of_blocks, of_servers]), b_ub=limits, bounds=(0, None))
    return float(-found.fun)


spans = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.floats(0.1, 9.0)).map(
    lambda one: Served(one[0], min(BLOCKS, one[0] + one[1]), one[2])
)


@given(st.lists(spans, min_size=1, max_size=7))
def test_the_greatest_rate_is_the_one_of_linear_programming(servers: list[Served]) -> None:
    assert greatest_rate(BLOCKS, servers) == pytest.approx(by_linear_programming(BLOCKS, servers), abs=1e-6)


def test_without_a_server_of_some_block_nothing_passes() -> None:
    assert greatest_rate(3, [Served(0, 2, 5.0)]) == 0.0


def test_work_moves_to_the_blocks_that_need_it() -> None:
    # The first does 8 units of work a second on two blocks, the second 4 on one of them.
    assert greatest_rate(2, [Served(0, 2, 4.0), Served(1, 2, 4.0)]) == pytest.approx(6.0)


@given(st.lists(spans, min_size=1, max_size=7))
def test_no_placement_beats_the_bound(servers: list[Served]) -> None:
    bound = greatest_rate_of_any(BLOCKS, [(one.blocks, one.throughput * one.blocks) for one in servers])
    assert greatest_rate(BLOCKS, servers) <= bound * (1 + 1e-9)


def test_the_bound_is_zero_where_not_all_blocks_can_be_held() -> None:
    assert greatest_rate_of_any(10, [(4, 1.0), (5, 1.0)]) == 0.0


def test_a_machine_with_few_blocks_is_no_help_beyond_them() -> None:
    # The first can hold one block of two: the second one does all the work of the other block.
    assert greatest_rate_of_any(2, [(1, 100.0), (2, 3.0)]) == pytest.approx(3.0)


def test_a_server_counts_for_no_more_than_its_caches_have_room_for() -> None:
    demand = Demand(arrivals_per_s=1.0, prompt_tokens=90, answer_tokens=10)
    crowded = Served(0, 2, 100.0, cache_tokens=250)  # two sessions, each of which lasts 5 s
    assert session_throughputs(2, [crowded], demand, answer_s=5.0) == [4.0, 4.0]


def test_caches_take_what_the_blocks_leave() -> None:
    model = ModelSize(num_blocks=10, block_bytes=10, token_bytes=1)
    machine = Machine(memory_bytes=100, decode_s=1.0, token_s=1.0)
    assert cache_tokens(machine, 5, model) == 10
    assert blocks_that_fit(machine, model, reserved_tokens=10) == 5
