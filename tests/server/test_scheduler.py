"""What runs next: decode first, in the turn of whoever has waited, and together where that pays."""

from __future__ import annotations

import math

import pytest

from swarmkit.server.engine.scheduler import (
    MOST_DECODE_TOKENS,
    ExpectedArrivals,
    PassTimes,
    Schedule,
    ScheduledTokens,
    next_schedule,
    next_stage,
)

from .scheduling import (
    LIMITS,
    READING_S,
    decode,
    prefill,
    turn_of,
)

# whose turn it is


def test_no_stage_is_next_when_no_step_waits() -> None:
    assert next_stage({}) is None


def test_a_stage_with_a_decode_step_comes_before_one_with_a_longer_wait() -> None:
    assert next_stage({"one": [prefill(waited_s=9.0)], "other": [decode(waited_s=0.1)]}) == "other"


def test_among_stages_that_decode_the_longest_wait_is_next() -> None:
    assert next_stage({"one": [decode(waited_s=0.1)], "other": [decode(waited_s=0.2)]}) == "other"


def test_a_stage_that_was_passed_over_twice_is_next() -> None:
    assert next_stage({"one": [decode()], "other": [prefill(passed_over=2)]}) == "other"


# what goes together


def test_without_work_there_is_no_schedule() -> None:
    assert turn_of() is None


def test_all_decode_steps_go_together() -> None:
    turn = turn_of(decode(0), decode(1, rows=3), decode(2, tokens=5))
    assert turn == Schedule((ScheduledTokens(0, 1), ScheduledTokens(1, 1, 3), ScheduledTokens(2, 5)))


def test_decode_steps_go_together_up_to_a_cap() -> None:
    turn = turn_of(*(decode(key, rows=MOST_DECODE_TOKENS // 2) for key in range(3)))
    assert turn is not None
    assert [scheduled.key for scheduled in turn.steps] == [0, 1]


def test_a_decode_step_beyond_the_cap_runs_all_the_same() -> None:
    assert turn_of(decode(rows=10 * MOST_DECODE_TOKENS)) == Schedule(
        (ScheduledTokens(0, 1, 10 * MOST_DECODE_TOKENS),)
    )


def test_those_served_least_come_first_when_not_all_fit() -> None:
    rows = MOST_DECODE_TOKENS // 2
    turn = turn_of(*(decode(key, served=served, rows=rows) for key, served in enumerate([7, 3, 5])))
    assert turn is not None
    assert [scheduled.key for scheduled in turn.steps] == [1, 2]


# waiting for each other


def test_a_decode_step_waits_for_one_that_is_about_to_come() -> None:
    assert turn_of(decode(), expected=ExpectedArrivals(((READING_S / 4, 1),))) == Schedule()


def test_a_decode_step_waits_a_little_for_one_that_is_overdue() -> None:
    assert turn_of(decode(), expected=ExpectedArrivals(((-READING_S / 4, 1),))) == Schedule()


@pytest.mark.parametrize("in_s", [0.6 * READING_S, -0.6 * READING_S, math.inf])
def test_a_decode_step_does_not_wait_for_what_is_far(in_s: float) -> None:
    assert turn_of(decode(), expected=ExpectedArrivals(((in_s, 1),))) == Schedule((ScheduledTokens(0, 1),))


def test_a_decode_step_does_not_wait_twice() -> None:
    waited = decode(waited_s=READING_S / 2)
    assert turn_of(waited, expected=ExpectedArrivals(((READING_S / 4, 1),))) == Schedule(
        (ScheduledTokens(0, 1),)
    )


def test_one_waits_for_many_that_come_while_it_would_run() -> None:
    assert turn_of(decode(), expected=ExpectedArrivals(((0.8 * READING_S, 8),))) == Schedule()


def test_many_do_not_wait_for_one_that_comes_while_they_would_run() -> None:
    assert turn_of(decode(rows=8), expected=ExpectedArrivals(((0.8 * READING_S, 1),))) == Schedule(
        (ScheduledTokens(0, 1, 8),)
    )


def test_nobody_waits_where_a_pass_of_two_takes_as_long_as_two_passes() -> None:
    times = PassTimes()
    for tokens in (1, 2, 4):
        times.learn(tokens, tokens * READING_S)
    turn = next_schedule([decode()], [], ExpectedArrivals(((0.001, 1),)), times, LIMITS)
    assert turn == Schedule((ScheduledTokens(0, 1),))


# several stages


def test_arrivals_at_several_stages_are_those_of_all() -> None:
    one, other = ExpectedArrivals(((0.5, 2),), 0.4), ExpectedArrivals(((0.1, 1), (0.9, 1)), 0.05)
    assert ExpectedArrivals.merged([one, other]) == ExpectedArrivals(((0.1, 1), (0.5, 2), (0.9, 1)), 0.05)
