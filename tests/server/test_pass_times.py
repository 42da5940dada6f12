"""What is learned of how long passes take."""

from __future__ import annotations

import pytest

from swarmkit.ewma import Ewma
from swarmkit.server.engine.scheduler import (
    PassTimes,
)

from .scheduling import (
    READING_S,
    TIMES,
    TOKEN_S,
    times_learnt,
)


def test_times_between_two_that_were_measured_lie_between_them() -> None:
    times = PassTimes()
    times.learn(1, 10.0)
    times.learn(9, 26.0)
    assert times.of(5) == pytest.approx(18.0)


def test_one_token_is_not_taken_for_as_long_as_the_prompt_before_it() -> None:
    times = PassTimes()
    times.learn(512, 1.0)
    assert times.of(1) < 0.01


def test_times_follow_what_is_measured() -> None:
    times = times_learnt()
    for _ in range(30):
        times.learn(8, 1.0)
    assert times.of(8) == pytest.approx(1.0, rel=0.01)


def test_one_pass_that_was_held_up_changes_little() -> None:
    times = times_learnt()
    times.learn(8, 60.0)
    assert times.of(8) < 2 * (READING_S + 8 * TOKEN_S)


@pytest.mark.parametrize("seconds", [0.03, 0.1, 0.4])
def test_the_tokens_within_a_time_take_just_that_time(seconds: float) -> None:
    tokens = TIMES.tokens_within(seconds)
    assert TIMES.of(tokens) <= seconds < TIMES.of(tokens + 1)


def test_nothing_fits_into_no_time() -> None:
    assert TIMES.tokens_within(0.0) == 0
    assert PassTimes().tokens_within(1.0) == 0


def test_fewer_tokens_fit_where_passes_vary() -> None:
    steady, unsteady = times_learnt(), times_learnt()
    for number in range(200):
        steady.learn(64, 0.084)
        unsteady.learn(64, 0.084 + (0.02 if number % 2 else -0.02))
    assert unsteady.of(64) == pytest.approx(0.084, abs=0.003)
    assert unsteady.tokens_within(0.09) < 64 <= steady.tokens_within(0.09)


def test_beyond_what_was_measured_the_line_goes_on() -> None:
    times = PassTimes()
    times.learn(4, 0.024)
    times.learn(16, 0.036)
    assert times.tokens_within(0.048) == pytest.approx(26, abs=4)


def test_one_thread_may_ask_while_another_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the event loop does for the queue, and the engine's thread."""
    larger = 1024

    class Learning(Ewma):
        """Asked for its mean, it has the other thread learn a pass of a new size just then."""

        @property  # type: ignore[override]
        def mean(self) -> float:
            nonlocal larger
            if larger < 2**20:
                larger *= 2
                times.learn(larger, READING_S + larger * TOKEN_S)
            return READING_S + TOKEN_S

        @mean.setter
        def mean(self, value: float) -> None:
            pass

    monkeypatch.setattr("swarmkit.server.engine.scheduler.Ewma", Learning)
    times = PassTimes()
    times.learn(1, READING_S + TOKEN_S)
    assert times.of(1) == pytest.approx(READING_S + TOKEN_S)
