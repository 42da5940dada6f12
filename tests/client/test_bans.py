"""Peers that failed are left aside, longer each time."""

from __future__ import annotations

import pytest

from swarmkit.client.routing.bans import PENALTY_S, Bans

from ..clocks import SetTime


@pytest.fixture
def clock() -> SetTime:
    return SetTime(1000.0)


@pytest.fixture
def bans(clock: SetTime) -> Bans:
    return Bans(2.0, 10.0, clock)


def test_no_peer_is_banned_at_first(bans: Bans) -> None:
    assert not bans.is_banned("peer")


def test_a_peer_that_failed_is_banned(bans: Bans) -> None:
    bans.failed("peer")
    assert bans.is_banned("peer")


def test_a_failure_of_one_peer_bans_no_other(bans: Bans) -> None:
    bans.failed("peer")
    assert not bans.is_banned("other")


@pytest.mark.parametrize(("later", "banned"), [(1.9, True), (2.0, False), (3.0, False)])
def test_a_ban_ends(bans: Bans, clock: SetTime, later: float, banned: bool) -> None:
    bans.failed("peer")
    clock.now += later
    assert bans.is_banned("peer") is banned


def test_every_failure_in_a_row_doubles_the_time_up_to_a_limit(bans: Bans, clock: SetTime) -> None:
    times = []
    for _ in range(5):
        times.append(bans.failed("peer"))
        clock.now += times[-1]
    assert times == [2.0, 4.0, 8.0, 10.0, 10.0]


def test_failing_for_ever_does_not_overflow(bans: Bans, clock: SetTime) -> None:
    for _ in range(2000):
        clock.now += bans.failed("peer")
    assert bans.failed("peer") == 10.0


def test_failures_at_the_same_time_are_one(bans: Bans, clock: SetTime) -> None:
    bans.failed("peer")
    clock.now += 0.5
    assert bans.failed("peer") == 1.5


def test_a_success_wipes_the_slate(bans: Bans, clock: SetTime) -> None:
    clock.now += bans.failed("peer")
    bans.worked("peer")
    assert bans.failed("peer") == 2.0


def test_a_success_ends_a_ban(bans: Bans) -> None:
    bans.failed("peer")
    bans.worked("peer")
    assert not bans.is_banned("peer")


def test_a_success_of_somebody_unknown_is_nothing(bans: Bans) -> None:
    bans.worked("peer")
    assert not bans.is_banned("peer")


def test_who_is_not_banned_costs_nothing(bans: Bans) -> None:
    assert bans.penalty_s("peer") == 0.0


def test_a_penalty_is_above_all_other_costs(bans: Bans) -> None:
    bans.failed("peer")
    assert bans.penalty_s("peer") >= PENALTY_S


def test_a_penalty_ends_with_the_ban(bans: Bans, clock: SetTime) -> None:
    bans.failed("peer")
    clock.now += 2.0
    assert bans.penalty_s("peer") == 0.0


def test_who_failed_more_often_costs_more(bans: Bans, clock: SetTime) -> None:
    clock.now += bans.failed("often")
    bans.failed("often")
    bans.failed("once")
    assert bans.penalty_s("often") > bans.penalty_s("once")


@pytest.mark.parametrize(("cost_s", "banned_s"), [(0.1, 2.0), (1.5, 6.0), (30.0, 10.0)])
def test_a_ban_lasts_several_times_what_the_failure_cost_up_to_the_limit(
    bans: Bans, cost_s: float, banned_s: float
) -> None:
    assert bans.failed("peer", cost_s) == banned_s


def test_a_peer_that_refuses_altogether_is_avoided_for_longer(clock: SetTime) -> None:
    assert Bans(2.0, 60.0, clock).failed("peer", excludes=True) == 10.0


def test_a_refusal_counts_until_the_peer_is_asked_again(bans: Bans, clock: SetTime) -> None:
    bans.failed("peer")
    bans.failed("peer", excludes=True)
    assert bans.excludes("peer")
    clock.now += 10.0
    assert not bans.excludes("peer")


def test_a_peer_that_works_excludes_nobody(bans: Bans) -> None:
    bans.failed("peer", excludes=True)
    bans.worked("peer")
    assert not bans.excludes("peer")
