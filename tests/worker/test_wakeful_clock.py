"""A watch over the clock tells a sleep from a clock that was set."""

from __future__ import annotations

import pytest

from swarmkit.worker.wakeful_clock import ClockWatch, Jump, WakefulClock


class TwoHands:
    """A clock whose durations and whose date are set apart."""

    def __init__(self) -> None:
        self.passed_s, self.date_s = 100.0, 1.7e9

    def now(self) -> float:
        return self.passed_s

    def time(self) -> float:
        return self.date_s


@pytest.mark.parametrize(
    ("passed_s", "by_date_s", "jump"),
    [
        (1.0, 1.0, Jump()),
        (3.0, 4.5, Jump()),
        (3600.0, 3600.0, Jump(slept_s=3600.0)),
        (1.0, 86401.0, Jump(set_s=86400.0)),
        (1.0, -3599.0, Jump(set_s=-3600.0)),
        (3600.0, 0.0, Jump(slept_s=3600.0, set_s=-3600.0)),
    ],
    ids=["a second", "a slow look", "asleep", "set forward", "set back", "asleep and set back"],
)
def test_what_happened_between_two_looks(passed_s: float, by_date_s: float, jump: Jump) -> None:
    clock = TwoHands()
    watch = ClockWatch(clock)
    clock.passed_s += passed_s
    clock.date_s += by_date_s
    assert watch.look() == jump


def test_a_jump_is_told_once() -> None:
    clock = TwoHands()
    watch = ClockWatch(clock)
    clock.date_s += 1000.0
    watch.look()
    assert watch.look() == Jump()


def test_the_computers_own_clock_goes_forward() -> None:
    clock = WakefulClock()
    before = clock.now()
    assert clock.now() >= before
