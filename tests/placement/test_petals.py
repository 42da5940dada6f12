"""Which blocks a newcomer serves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.errors import UsageError
from swarmkit.placement.description import Served
from swarmkit.placement.petals import choose_blocks, should_move
from swarmkit.placement.supply import block_throughputs


def test_throughputs_of_servers_add_up_block_by_block() -> None:
    assert block_throughputs(4, [Served(0, 3, 2.0), Served(2, 4, 5.0)]) == [2.0, 2.0, 7.0, 5.0]


def test_servers_that_claim_blocks_outside_the_model_count_within_it() -> None:
    assert block_throughputs(2, [Served(-3, 9, 1.0)]) == [1.0, 1.0]


def test_the_first_server_begins_at_the_first_block() -> None:
    assert choose_blocks(4, 2, []) == (0, 2)


def test_the_second_server_takes_what_the_first_left() -> None:
    assert choose_blocks(4, 2, [Served(0, 2, 1.0)]) == (2, 4)


def test_a_hole_in_the_middle_is_filled() -> None:
    assert choose_blocks(6, 2, [Served(0, 2, 1.0), Served(4, 6, 1.0)]) == (2, 4)


def test_the_weakest_blocks_are_strengthened() -> None:
    assert choose_blocks(4, 2, [Served(0, 2, 3.0), Served(2, 4, 2.0)]) == (2, 4)


def test_between_two_worst_blocks_the_next_worst_decides() -> None:
    servers = [Served(0, 1, 1.0), Served(1, 2, 5.0), Served(2, 3, 4.0), Served(3, 4, 1.0)]
    assert choose_blocks(4, 2, servers) == (2, 4)


def test_among_equals_the_leftmost_is_chosen() -> None:
    assert choose_blocks(4, 1, [Served(0, 4, 1.0)]) == (0, 1)


def test_a_server_that_can_hold_all_takes_all() -> None:
    assert choose_blocks(4, 4, [Served(0, 2, 1.0)]) == (0, 4)


@pytest.mark.parametrize("count", [0, 5, -1])
def test_more_or_fewer_blocks_than_there_are_is_a_mistake(count: int) -> None:
    with pytest.raises(UsageError, match="1 to 4 blocks"):
        choose_blocks(4, count, [])


@given(
    num_blocks=st.integers(1, 12),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=12),
)
def test_newcomers_leave_no_hole_as_soon_as_they_could_cover_everything(
    num_blocks: int, counts: list[int]
) -> None:
    served: list[Served] = []
    for count in counts:
        start, stop = choose_blocks(num_blocks, min(count, num_blocks), served)
        served.append(Served(start, stop, 1.0))
    # A window overlaps another one while there is a hole only where no hole is wide enough for it.
    covered = sum(total > 0 for total in block_throughputs(num_blocks, served))
    assert covered >= min(num_blocks, max(min(count, num_blocks) for count in counts))


# moving


def wants_to_move(own: int, servers: list[Served], balance_quality: float = 0.75) -> bool:
    return should_move(4, own, servers, balance_quality=balance_quality, chance=random.Random(1))


def test_a_server_moves_where_that_makes_the_weakest_block_much_stronger() -> None:
    servers = [Served(0, 2, 1.0), Served(0, 2, 1.0), Served(0, 2, 1.0), Served(2, 4, 1.0)]
    assert wants_to_move(0, servers)


def test_a_server_stays_where_it_is_the_only_one_of_a_block() -> None:
    assert not wants_to_move(0, [Served(0, 2, 1.0), Served(2, 4, 1.0), Served(2, 4, 1.0)])


def test_a_server_stays_where_the_gain_is_below_the_threshold() -> None:
    servers = [Served(0, 2, 1.0), Served(0, 2, 4.0), Served(2, 4, 4.5)]
    assert not wants_to_move(0, servers)


@pytest.mark.parametrize(("balance_quality", "moves"), [(0.0, False), (1.5, True)])
def test_the_threshold_can_switch_moving_off_and_on(balance_quality: float, moves: bool) -> None:
    servers = [Served(0, 2, 1.0), Served(0, 2, 1.0), Served(2, 4, 1.0)]
    assert wants_to_move(0, servers, balance_quality) is moves
