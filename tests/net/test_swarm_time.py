"""A peer whose clock is wrong takes the time of the swarm, which strangers alone do not decide."""

from __future__ import annotations

import time

import pytest

from swarmkit.clock import SystemClock
from swarmkit.net.hivemind.swarm_time import SwarmTime, agreed_offset

HOUR = 3600.0


class SetClock(SystemClock):
    """A computer's clock that the test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0
        self.wrong_s = 0.0

    def now(self) -> float:  # type: ignore[override]
        return self.passed

    def uncorrected(self) -> float:
        return 1.8e9 + self.passed + self.wrong_s

    def correct(self, seconds: float) -> None:
        self.correction_s = seconds
        self.time = lambda: self.uncorrected() + seconds

    def asks(self, swarm_time: SwarmTime, peer_id: str, offset: float) -> None:
        """A peer whose date is right but for `offset` answers."""
        date = self.uncorrected()
        swarm_time.note(peer_id, date - self.wrong_s + offset, date, date)


# what peers agree on


def test_a_clock_that_differs_little_is_right() -> None:
    assert agreed_offset({"a": 2.0, "b": -1.0}, {"a"}) == 0.0


@pytest.mark.parametrize("offset", [-HOUR, HOUR])
def test_a_clock_that_differs_from_the_peer_that_was_joined_is_wrong(offset: float) -> None:
    assert agreed_offset({"a": offset}, {"a"}) == offset


def test_strangers_do_not_count_beside_a_peer_that_was_joined() -> None:
    strangers = {f"stranger {number}": HOUR for number in range(50)}
    assert agreed_offset({"a": 0.1, **strangers}, {"a"}) == 0.0


def test_a_clock_is_right_if_one_of_the_peers_that_were_joined_says_so() -> None:
    assert agreed_offset({"a": HOUR, "b": 0.5}, {"a", "b"}) == 0.0


def test_among_strangers_the_majority_decides() -> None:
    honest = {"a": 0.2, "b": -0.3}
    assert agreed_offset({**honest, "c": HOUR, "d": HOUR}, ()) == 0.0
    assert agreed_offset({"a": HOUR, "b": HOUR + 1, "c": 0.0}, ()) == 0.0
    assert agreed_offset({"a": HOUR, "b": HOUR + 1, "c": HOUR + 2}, ()) == HOUR


def test_one_stranger_alone_changes_nothing() -> None:
    assert agreed_offset({"a": HOUR}, ()) == 0.0


# what a peer does


def test_the_date_is_corrected() -> None:
    clock = SetClock()
    clock.wrong_s = -HOUR
    clock.asks(SwarmTime(clock, {"a"}), "a", 0.0)
    assert clock.time() == pytest.approx(1.8e9, abs=1)


def test_the_correction_ends_when_the_clock_was_set_right() -> None:
    clock = SetClock()
    clock.wrong_s = HOUR
    swarm_time = SwarmTime(clock, {"a"})
    clock.asks(swarm_time, "a", 0.0)
    clock.wrong_s = 0.0
    assert swarm_time.should_ask()
    clock.asks(swarm_time, "a", 0.0)
    assert clock.correction_s == 0.0


def test_peers_are_asked_when_the_clock_was_set() -> None:
    clock = SetClock()
    swarm_time = SwarmTime(clock, {"a"})
    assert not swarm_time.should_ask()
    clock.wrong_s = HOUR
    assert swarm_time.should_ask()
    assert not swarm_time.should_ask()


def test_peers_are_asked_now_and_then() -> None:
    clock = SetClock()
    swarm_time = SwarmTime(clock, {"a"})
    clock.passed += 31
    assert swarm_time.should_ask()


@pytest.mark.parametrize("date", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_dates_that_are_none_are_not_taken_in(date: float) -> None:
    clock = SetClock()
    SwarmTime(clock, {"a"}).note("a", date, clock.uncorrected(), clock.uncorrected())
    assert clock.correction_s == 0.0


def test_the_system_clock_is_the_computers_until_it_is_corrected() -> None:
    clock = SystemClock()
    assert clock.time() == pytest.approx(time.time(), abs=5)
    clock.correct(100.0)
    assert clock.time() == pytest.approx(time.time() + 100, abs=5)
