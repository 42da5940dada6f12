"""What others may make a client wait for its tokens, and what follows when they have had it wait longer."""

from __future__ import annotations

import pytest

from swarmkit.net.transport.shares import Holder
from swarmkit.server.engine.delays import (
    DecodeRound,
    Delays,
    Owed,
    balance_after,
    crowds_of,
    shares_of_others,
)
from swarmkit.server.engine.scheduler import JobTurns, PassTimes, Schedule, next_schedule

from .scheduling import LIMITS, NOBODY, READING_S, TOKEN_S, decode, named, prefill, tokens_for, turn_of

CLIENT, STRANGER = named("client"), named("stranger")
QUIET = DecodeRound(away_s=0.01, waited_s=0.0, ran_s=0.02, alone_s=0.02)
DELAYED = DecodeRound(away_s=0.01, waited_s=0.1, ran_s=0.06, alone_s=0.02)
PASS_S = READING_S + TOKEN_S


# a round


def test_what_a_step_waited_and_what_its_pass_took_longer_is_a_delay() -> None:
    assert DELAYED.delay_s == pytest.approx(0.1 + 0.04)


def test_a_pass_that_is_shorter_than_usual_makes_up_for_nothing() -> None:
    assert DecodeRound(0.01, 0.1, ran_s=0.01, alone_s=0.02).delay_s == pytest.approx(0.1)


def test_a_round_allows_for_less_delay_than_it_takes_by_itself() -> None:
    assert 0 < QUIET.allowed_s(1) < 0.03


def test_beside_more_others_a_round_allows_for_more() -> None:
    assert QUIET.allowed_s(7) == pytest.approx(7 * QUIET.allowed_s(1))


def test_a_client_that_thinks_for_hours_saves_up_no_more_than_one_that_does_for_seconds() -> None:
    assert DecodeRound(1e4, 0, 0.02, 0.02).allowed_s(1) == DecodeRound(10.0, 0, 0.02, 0.02).allowed_s(1)


def test_others_owe_what_they_delay_a_client_by_beyond_what_is_allowed() -> None:
    assert balance_after(0.0, DELAYED, 1) == pytest.approx(DELAYED.allowed_s(1) - DELAYED.delay_s)


def test_rounds_without_a_delay_make_up_for_it() -> None:
    balance = -0.05
    for _ in range(5):
        balance = balance_after(balance, QUIET, 1)
    assert balance == pytest.approx(5 * QUIET.allowed_s(1) - 0.05)


def test_a_long_quiet_time_saves_up_two_rounds_of_delay() -> None:
    balance = 0.0
    for _ in range(1000):
        balance = balance_after(balance, QUIET, 1)
    assert balance == pytest.approx(2 * QUIET.allowed_s(1))


def test_nobody_owes_more_than_a_quarter_of_a_second() -> None:
    assert balance_after(0.0, DecodeRound(0.01, 60.0, 0.02, 0.02), 1) == -0.25


@pytest.mark.parametrize("others", [1, 3])
def test_a_client_that_is_delayed_as_much_as_is_allowed_has_its_part(others: int) -> None:
    """Of two it has more than half of its speed, of four more than a quarter."""
    alone_s, rounds_s, balance, delay_s = 0.03, 0.0, 0.0, 0.1
    for _ in range(1000):
        waited_s = delay_s if balance >= 0 else 0.0
        balance = balance_after(balance, DecodeRound(0.01, waited_s, 0.02, 0.02), others)
        rounds_s += alone_s + waited_s
    assert 1000 * alone_s / rounds_s > 1 / (1 + others)


# shares


@pytest.mark.parametrize(
    ("active", "others"),
    [
        ([], 1),
        ([CLIENT], 1),
        ([CLIENT, STRANGER], 1),
        ([STRANGER, named("third"), named("fourth")], 3),
        ([named(name, "stranger's") for name in "abcdef"], 1),
        ([*(named(name, "stranger's") for name in "abcdef"), named("neighbour")], 3),
    ],
)
def test_hosts_share_alike_and_so_do_the_peers_of_each(active: list[Holder], others: int) -> None:
    assert shares_of_others(CLIENT, active) == others


def test_a_client_of_which_more_steps_wait_than_run_is_a_crowd() -> None:
    waiting = {CLIENT: 2, STRANGER: 300}
    assert crowds_of(waiting, {CLIENT: 2, STRANGER: 2}, waiting) == {STRANGER}


def test_many_names_of_one_host_beside_another_host_are_a_crowd() -> None:
    names = [named(str(number), "stranger's") for number in range(9)]
    waiting = dict.fromkeys([CLIENT, *names], 1)
    assert crowds_of(waiting, {CLIENT: 1, names[0]: 1}, waiting) == {names[0]}


# accounts


def account(*, waited_s: float, others: float = 1) -> Delays:
    """A client that has decoded three times, each of them delayed for so long."""
    delays, now = Delays(), 0.0
    for _ in range(3):
        came = now + 0.01
        began = came + waited_s
        now = began + 0.02
        delays.decoded(CLIENT, came, began, 0.02, 0.02, now, others)
    return delays


def test_nothing_is_owed_to_a_client_that_does_not_wait() -> None:
    assert account(waited_s=0.0).owed(0.1) == {}


def test_a_client_is_owed_what_it_waited_too_long() -> None:
    delays = account(waited_s=0.05)
    owed = delays.owed(0.24)[CLIENT]
    assert owed.seconds == pytest.approx(2 * (0.05 - QUIET.allowed_s(1)))
    assert owed.in_s == pytest.approx(0.01)


def test_a_client_that_waits_for_its_own_steps_is_owed_nothing() -> None:
    delays = Delays()
    for number in range(3):  # all came at once, and run one after the other
        began = 0.01 + 0.02 * number
        delays.decoded(CLIENT, 0.01, began, 0.02, 0.02, began + 0.02, 1)
    assert delays.owed(0.1) == {}


def test_a_client_that_has_stayed_away_for_two_seconds_is_owed_nothing_any_more() -> None:
    delays = account(waited_s=0.05)
    assert delays.owed(2.3) == {}
    assert len(delays) == 0


def test_a_client_that_has_become_a_crowd_is_owed_nothing() -> None:
    delays = account(waited_s=0.05)
    delays.forget(CLIENT)
    assert delays.owed(0.24) == {}


@pytest.mark.parametrize(("in_s", "is_worth"), [(0.5, True), (-0.04, True), (-0.06, False)])
def test_nobody_waits_for_a_client_longer_than_is_owed(in_s: float, is_worth: bool) -> None:
    assert Owed(0.05, in_s).is_worth_waiting is is_worth


# what runs next

CROWD = tuple(decode(key, client=STRANGER) for key in range(100))
RECENT = {CLIENT: 1, STRANGER: 1}
BOTH = frozenset(RECENT)
OWED = {CLIENT: Owed(0.01, 0.0)}


def keys_of(turn: Schedule | None) -> set[int]:
    assert turn is not None
    return {piece.key for piece in turn.steps}


def test_a_client_that_is_owed_something_runs_without_the_crowd() -> None:
    turn = turn_of(*CROWD, decode(999, client=CLIENT), recent=RECENT, just_served=BOTH, owed=OWED)
    assert keys_of(turn) == {999}


def test_a_crowd_that_has_not_just_decoded_runs_beside_it_all_the_same() -> None:
    turn = turn_of(*CROWD, decode(999, client=CLIENT), recent=RECENT, owed=OWED)
    assert len(keys_of(turn) - {999}) == 1


def test_a_client_with_as_many_steps_runs_beside_it_all_the_same() -> None:
    steps = decode(0, client=STRANGER), decode(999, client=CLIENT)
    assert keys_of(turn_of(*steps, recent=RECENT, just_served=BOTH, owed=OWED)) == {0, 999}


soon_or_late = pytest.mark.parametrize(
    ("owed", "waits"),
    [
        (Owed(0.05, PASS_S / 2), True),
        (Owed(0.05, -0.04), True),
        (Owed(0.05, -0.06), False),
        (Owed(0.05, 9.0), False),
    ],
)


@soon_or_late
def test_a_crowd_waits_for_a_client_that_it_owes_something_but_for_no_longer(owed: Owed, waits: bool) -> None:
    assert (turn_of(*CROWD, recent=RECENT, owed={CLIENT: owed}) == Schedule()) is waits


def test_a_client_with_one_session_waits_for_nobody_else_that_is_owed_something() -> None:
    turn = turn_of(decode(0, client=STRANGER), recent=RECENT, owed={CLIENT: Owed(0.05, 0.001)})
    assert keys_of(turn) == {0}


def test_a_client_that_is_owed_something_runs_without_the_prompts_of_others() -> None:
    turn = turn_of(decode(0, client=CLIENT), prefill(1, client=STRANGER), owed=OWED)
    assert keys_of(turn) == {0}


def test_a_prompt_of_the_client_that_is_owed_something_waits_for_nobody() -> None:
    turn = turn_of(decode(0, client=CLIENT), prefill(1, client=CLIENT), owed=OWED)
    assert keys_of(turn) == {0, 1}


@soon_or_late
def test_a_prompt_waits_for_a_client_that_is_owed_something_but_for_no_longer(
    owed: Owed, waits: bool
) -> None:
    assert (turn_of(prefill(client=STRANGER), owed={CLIENT: owed}) == Schedule()) is waits


def test_a_prompt_that_has_waited_for_eight_passes_goes_on() -> None:
    turn = turn_of(decode(0, client=CLIENT), prefill(1, client=STRANGER, passed_over=8), owed=OWED)
    assert keys_of(turn) == {0, 1}


def test_of_many_prompts_of_a_client_none_has_waited_if_one_has_just_run() -> None:
    prompts = prefill(1, client=STRANGER, passed_over=8), prefill(2, client=STRANGER, passed_over=1)
    assert keys_of(turn_of(decode(0, client=CLIENT), *prompts, owed=OWED)) == {0}


def test_a_piece_of_a_prompt_may_delay_the_short_step_of_another_client_by_20_ms() -> None:
    times = PassTimes()
    for tokens, seconds in ((1, 0.001), (4, 0.005), (16, 0.006), (64, 0.01), (256, 0.03)):
        times.learn(tokens, seconds)
    steps = decode(0, client=CLIENT), prefill(1, client=STRANGER)
    turn = next_schedule(steps, (), NOBODY, times, LIMITS)
    assert 0.015 < times.of(1 + tokens_for(1, turn)) <= 0.021


def test_bulk_jobs_have_a_tenth_of_the_time_while_somebody_is_owed_something() -> None:
    turns, now, had_s = JobTurns(), 0.0, 0.0
    for _ in range(10_000):
        (bulk,) = turns.waiting([True], now, OWED)
        if not bulk.rests:
            turns.ran(True, now, now + 0.05)
            now, had_s = now + 0.05, had_s + 0.05
        now += 0.001
    assert 0.08 < had_s / now < 0.12
