"""When sessions that decode are expected back."""

from __future__ import annotations

import math

import pytest

from swarmkit.server.engine.scheduler import (
    ArrivalPredictor,
    ExpectedArrivals,
)

from .scheduling import (
    NOBODY,
    named,
)


def decoders(session: str = "session") -> ArrivalPredictor:
    """A session that decodes three tokens in each step, from 10.0 to 10.1 and from 10.3 to 10.4."""
    decoders = ArrivalPredictor()
    decoders.decoded(session, 3, came=10.0, done=10.1)
    decoders.decoded(session, 3, came=10.3, done=10.4)
    return decoders


def test_a_decoder_is_expected_after_as_long_as_it_was_away() -> None:
    expected = decoders().expected(now=10.45)
    assert expected.arrivals == ((pytest.approx(0.15), 3),)


def test_before_it_is_known_how_a_decoder_varies_it_may_be_back_any_moment() -> None:
    assert decoders().expected(now=10.4).soonest_s == pytest.approx(0.0)


def test_a_decoder_that_is_always_away_for_as_long_is_not_back_sooner() -> None:
    regular = ArrivalPredictor()
    for step in range(40):
        regular.decoded("session", 1, came=10.0 + step, done=10.1 + step)
    assert regular.expected(now=49.1).soonest_s == pytest.approx(0.9, abs=0.01)


def test_a_decoder_that_comes_when_it_likes_may_be_back_sooner() -> None:
    irregular = ArrivalPredictor()
    for step in range(40):
        irregular.decoded("session", 1, came=10.0 + step + 0.2 * (step % 2), done=10.3 + step)
    expected = irregular.expected(now=49.3)
    assert expected.soonest_s < 0.7 < expected.arrivals[0][0]


def test_a_decoder_that_is_a_little_late_is_still_expected() -> None:
    assert decoders().expected(now=10.7).arrivals == ((pytest.approx(-0.1), 3),)


def test_a_decoder_that_is_here_is_not_expected() -> None:
    assert decoders().expected(now=10.45, here={"session"}) == NOBODY


def test_a_decoder_that_is_late_is_waited_for_no_longer() -> None:
    assert decoders().expected(now=10.9) == ExpectedArrivals(((math.inf, 3),))


class Counted:
    """Counts the sessions that are looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def __contains__(self, session: object) -> bool:
        self.looks += 1
        return False


def test_of_a_crowd_of_sessions_few_are_looked_at() -> None:
    crowd, looked_at = ArrivalPredictor(), Counted()
    for number in range(1000):
        crowd.decoded(number, 1, came=10.0, done=10.1, client=named("many"))
    crowd.decoded("session", 3, came=10.0, done=10.1, client=named("one"))
    assert 3 in [tokens for _, tokens in crowd.expected(now=10.2, here=looked_at).arrivals]
    assert looked_at.looks == 64 + 1


def test_a_decoder_that_stays_away_has_left() -> None:
    assert decoders().expected(now=11.3) == NOBODY


def test_who_is_back_after_he_was_taken_to_have_left_is_given_more_time() -> None:
    back = decoders()
    assert back.expected(now=11.3) == NOBODY
    back.decoded("session", 3, came=13.4, done=13.5)
    assert back.expected(now=14.0).tokens == 3


def test_who_is_back_after_long_is_a_newcomer() -> None:
    back = decoders()
    back.decoded("session", 3, came=60.0, done=60.1)
    assert back.expected(now=60.2) == ExpectedArrivals(((math.inf, 3),))
    assert back.expected(now=62.2) == NOBODY


def test_the_first_of_several_decoders_is_expected() -> None:
    both = decoders()
    both.decoded("other", 1, came=10.0, done=10.1)
    both.decoded("other", 1, came=10.15, done=10.4)
    arrivals = both.expected(now=10.4).arrivals
    assert arrivals == ((pytest.approx(0.05), 1), (pytest.approx(0.2), 3))


def test_a_session_that_begins_a_prefill_does_not_decode() -> None:
    left = decoders()
    left.leave("session")
    assert left.expected(now=10.4) == NOBODY
