"""Peers that failed are left aside, longer each time."""

from __future__ import annotations

import pytest

from swarmkit.client.routing.bans import PENALTY_S, Bans
from swarmkit.errors import (
    NotAdmittedError,
    NotServedError,
    PeerError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    RemoteError,
)

from ..clocks import SetTime
from ..net.announcements import announcement

REFUSAL = NotAdmittedError("it deals with others only")


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
    assert Bans(2.0, 60.0, clock).failed("peer", error=REFUSAL) == 10.0


def test_a_refusal_counts_until_the_peer_is_asked_again(bans: Bans, clock: SetTime) -> None:
    bans.failed("peer")
    bans.failed("peer", error=REFUSAL)
    assert bans.excludes("peer")
    clock.now += 10.0
    assert not bans.excludes("peer")


def test_a_peer_that_works_excludes_nobody(bans: Bans) -> None:
    bans.failed("peer", error=REFUSAL)
    bans.worked("peer")
    assert not bans.excludes("peer")


# connections that were lost


@pytest.fixture
def after_a_loss(bans: Bans, clock: SetTime) -> Bans:
    """A connection to a server was lost some time ago, at second 1000; its ban has ended."""
    bans.failed(announcement().service_id, error=PeerUnreachableError("the connection was lost"))
    clock.now += 3.0
    return bans


def heard(bans: Bans, asked_at: float, *sequences: int) -> None:
    """Look-ups find one announcement of the server after the other."""
    for sequence in sequences:
        found = announcement(sequence=sequence)
        bans.heard({found.service_id: found}, asked_at)


def is_last(bans: Bans) -> bool:
    return bans.is_doubtful(announcement().service_id) and bans.penalty_s(announcement().service_id) > 0


def test_a_server_that_was_lost_comes_last_when_its_ban_has_ended(after_a_loss: Bans) -> None:
    assert is_last(after_a_loss)
    assert not after_a_loss.is_banned(announcement().service_id)


def test_a_banned_server_comes_after_one_that_was_lost(after_a_loss: Bans) -> None:
    after_a_loss.failed("banned")
    assert after_a_loss.penalty_s("banned") > after_a_loss.penalty_s(announcement().service_id)


def test_what_a_lost_server_announced_before_does_not_bring_it_back(after_a_loss: Bans) -> None:
    heard(after_a_loss, 1001.0, 7, 7, 7)
    assert is_last(after_a_loss)


def test_an_announcement_that_this_peer_had_not_seen_yet_does_not_bring_it_back(after_a_loss: Bans) -> None:
    heard(after_a_loss, 999.0, 7)  # a look-up that was under way
    heard(after_a_loss, 1001.0, 8, 8)
    assert is_last(after_a_loss)


def test_a_lost_server_that_announces_itself_anew_is_one_like_others(after_a_loss: Bans) -> None:
    heard(after_a_loss, 1001.0, 7, 8)
    assert not is_last(after_a_loss)


def test_a_lost_server_that_works_is_one_like_others(after_a_loss: Bans) -> None:
    after_a_loss.worked(announcement().service_id)
    assert not is_last(after_a_loss)


def test_a_lost_server_that_nobody_announces_any_more_is_forgotten(after_a_loss: Bans) -> None:
    after_a_loss.heard({}, 1001.0)
    assert not is_last(after_a_loss)


@pytest.mark.parametrize(
    ("error", "may_be_gone"),
    [
        (None, False),
        (PeerTimeoutError("slow"), False),
        (ProtocolError("not finite"), False),
        (RemoteError("no", code="not_admitted"), False),
        (REFUSAL, False),
        (NotServedError("not this"), True),
        (PeerUnreachableError("nobody there"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_a_server_that_was_not_reached_or_serves_no_more_may_be_gone(
    bans: Bans, clock: SetTime, error: PeerError | None, may_be_gone: bool
) -> None:
    clock.now += bans.failed(announcement().service_id, error=error)
    assert is_last(bans) is may_be_gone
