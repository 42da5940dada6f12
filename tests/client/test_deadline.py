"""When a peer has been silent for too long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.client.routing.deadline import DeadlinePolicy, StepTimes

POLICY = DeadlinePolicy(first_s=30.0, min_s=1.0, factor=8.0)


def after(*steps: tuple[int, float], claimed_rate: float = 0.0) -> StepTimes:
    """What was learned from steps of so many tokens and seconds."""
    times = StepTimes(claimed_rate)
    for tokens, seconds in steps:
        times.observe(tokens, seconds)
    return times


# before anything was seen


def test_an_unknown_peer_gets_the_first_deadline() -> None:
    assert after().deadline_s(1, POLICY) == 30.0


def test_a_peer_is_first_judged_by_what_it_claims() -> None:
    assert after(claimed_rate=100.0).deadline_s(100, POLICY) == pytest.approx(5.0 + 8.0)


def test_a_claim_never_buys_more_than_the_first_deadline() -> None:
    assert after(claimed_rate=1e-6).deadline_s(1000, POLICY) == 30.0


def test_there_is_no_round_trip_before_the_first_step() -> None:
    assert after().round_trip_s is None


# after


def test_the_round_trip_is_that_of_single_tokens() -> None:
    assert after((1, 0.5), (1000, 60.0)).round_trip_s == 0.5


def test_a_fast_peer_gets_the_least_deadline() -> None:
    assert after(*[(1, 0.001)] * 50).deadline_s(1, POLICY) == 1.0


def test_a_slow_peer_gets_more() -> None:
    assert after(*[(1, 2.0)] * 50).deadline_s(1, POLICY) == pytest.approx(16.0, rel=0.01)


def test_the_first_measure_is_believed_with_care() -> None:
    assert after((1, 2.0)).deadline_s(1, POLICY) > after(*[(1, 2.0)] * 50).deadline_s(1, POLICY)


def test_an_uneven_peer_gets_more_than_an_even_one() -> None:
    uneven, even = after(*[(1, 1.0), (1, 3.0)] * 25), after(*[(1, 2.0)] * 50)
    assert uneven.deadline_s(1, POLICY) > even.deadline_s(1, POLICY)


def test_the_deadline_follows_a_peer_that_becomes_slower() -> None:
    fast = [(1, 0.5)] * 50
    assert after(*fast, *[(1, 5.0)] * 50).deadline_s(1, POLICY) > 5 * after(*fast).deadline_s(1, POLICY)


def test_it_follows_a_peer_that_becomes_faster() -> None:
    slow = [(1, 5.0)] * 50
    assert after(*slow, *[(1, 0.5)] * 100).deadline_s(1, POLICY) < after(*slow).deadline_s(1, POLICY) / 5


def test_longer_steps_get_longer() -> None:
    times = after(*[(100, 10.0)] * 50)
    assert times.deadline_s(200, POLICY) == pytest.approx(2 * times.deadline_s(100, POLICY), rel=0.01)


def test_long_steps_do_not_spoil_the_deadline_of_single_tokens() -> None:
    assert after(*[(1, 0.5)] * 50, (1000, 60.0)).deadline_s(1, POLICY) == after(*[(1, 0.5)] * 50).deadline_s(
        1, POLICY
    )


def test_a_prompt_is_not_expected_in_the_time_of_a_token() -> None:
    assert after(*[(1, 0.5)] * 50).deadline_s(1000, POLICY) > 500


def test_a_token_after_a_prompt_is_not_expected_in_no_time() -> None:
    assert after((1000, 10.0)).deadline_s(1, POLICY) >= 1.0


def test_a_deadline_that_passed_doubles_the_next() -> None:
    times = after(*[(1, 1.0)] * 50)
    before = times.deadline_s(1, POLICY)
    times.timed_out()
    assert times.deadline_s(1, POLICY) == 2 * before


def test_patience_has_an_end() -> None:
    times = after(*[(1, 1.0)] * 50)
    before = times.deadline_s(1, POLICY)
    for _ in range(100):
        times.timed_out()
    assert times.deadline_s(1, POLICY) == 64 * before


def test_a_step_that_came_ends_the_patience() -> None:
    times = after(*[(1, 1.0)] * 50)
    times.timed_out()
    times.observe(1, 1.0)
    assert times.deadline_s(1, POLICY) < 10.0


steps = st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1e4)), max_size=20)


@given(steps, st.integers(1, 5000), st.floats(0, 1e9))
def test_a_deadline_is_never_below_the_least_and_never_endless(
    seen: list[tuple[int, float]], tokens: int, claimed_rate: float
) -> None:
    assert 1.0 <= after(*seen, claimed_rate=claimed_rate).deadline_s(tokens, POLICY) < 1e10


@given(st.floats(0.01, 100.0), st.integers(1, 30))
def test_a_peer_that_stays_as_it_was_is_never_too_late(seconds: float, number: int) -> None:
    assert after(*[(1, seconds)] * number).deadline_s(1, POLICY) >= 4 * seconds
