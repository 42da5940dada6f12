"""What runs next: decode first, prefill in the time that is left, everybody in the end."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest

from swarmkit.ewma import Ewma
from swarmkit.models.execution.attention_cost import AttentionCost
from swarmkit.server.engine.scheduler import (
    MOST_DECODE_TOKENS,
    ArrivalPredictor,
    ExpectedArrivals,
    FairShares,
    PassLimits,
    PassTimes,
    Schedule,
    ScheduledTokens,
    WaitingJob,
    WaitingStep,
    is_decode,
    next_schedule,
    next_stage,
)

NOBODY = ExpectedArrivals()
LIMITS = PassLimits(chunk_tokens=512, decode_slowdown=2.0)
READING_S, TOKEN_S = 0.020, 0.001
"""A forward pass over n tokens takes READING_S + n x TOKEN_S, unless a test says otherwise."""


def times_learnt() -> PassTimes:
    times = PassTimes()
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        times.learn(tokens, READING_S + tokens * TOKEN_S)
    return times


TIMES = times_learnt()


def decode(key: int = 0, served: float = 0, rows: int = 1, tokens: int = 1, **more: object) -> WaitingStep:
    return replace(WaitingStep(key, served, rows, tokens, True, 0.0, 0), **more)  # type: ignore[arg-type]


def prefill(
    key: int = 0, tokens: int = 4096, served: float = 0, rows: int = 1, **more: object
) -> WaitingStep:
    return replace(WaitingStep(key, served, rows, tokens, False, 0.0, 0), **more)  # type: ignore[arg-type]


def turn_of(
    *steps: WaitingStep, jobs: tuple[WaitingJob, ...] = (), expected: ExpectedArrivals = NOBODY
) -> Schedule | None:
    return next_schedule(steps, jobs, expected, TIMES, LIMITS)


def tokens_for(key: int, turn: Schedule | None) -> int:
    assert turn is not None
    return sum(scheduled.tokens for scheduled in turn.steps if scheduled.key == key)


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


# how much prefill


def test_prefill_goes_in_whole_chunks_when_nobody_decodes() -> None:
    assert turn_of(prefill(tokens=4096)) == Schedule((ScheduledTokens(0, 512),))


def test_a_prefill_that_is_shorter_than_a_chunk_leaves_room_for_the_next() -> None:
    assert turn_of(prefill(0, 400), prefill(1, 400)) == Schedule(
        (ScheduledTokens(0, 400), ScheduledTokens(1, 112))
    )


def test_a_chunk_counts_the_tokens_of_all_rows() -> None:
    assert turn_of(prefill(rows=4)) == Schedule((ScheduledTokens(0, 128, 4),))


def test_more_rows_than_a_chunk_still_go_on() -> None:
    assert turn_of(prefill(rows=1000)) == Schedule((ScheduledTokens(0, 1, 1000),))


def test_those_served_least_are_prefilled_first() -> None:
    assert turn_of(prefill(0, served=9), prefill(1, served=4)) == Schedule((ScheduledTokens(1, 512),))


def test_beside_a_decode_step_prefill_takes_no_longer_than_the_step() -> None:
    tokens = tokens_for(1, turn_of(decode(0), prefill(1)))
    assert tokens == pytest.approx((READING_S + TOKEN_S) / TOKEN_S, abs=2)


def due_in(seconds: float, varies_s: float = 0.0) -> ExpectedArrivals:
    return ExpectedArrivals(((seconds, 1),), seconds - varies_s)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_beside_decode_steps_prefill_fills_a_passs_rows(rows: int) -> None:
    turn = turn_of(decode(0, rows=rows), prefill(1))
    assert (rows + tokens_for(1, turn)) % 4 == 0


def test_before_a_decoder_is_back_prefill_may_go_on_so_long_that_he_waits_as_long_as_his_step_takes() -> None:
    tokens = tokens_for(0, turn_of(prefill(0), expected=due_in(0.1)))
    assert READING_S + tokens * TOKEN_S == pytest.approx(0.1 + READING_S + TOKEN_S, abs=2 * TOKEN_S)


def test_a_decoder_who_may_be_back_sooner_than_usual_waits_no_longer() -> None:
    tokens = tokens_for(0, turn_of(prefill(0), expected=due_in(0.1, varies_s=0.06)))
    assert READING_S + tokens * TOKEN_S == pytest.approx(0.04 + READING_S + TOKEN_S, abs=2 * TOKEN_S)


def test_just_before_a_decoder_is_back_prefill_pauses() -> None:
    assert turn_of(prefill(0), expected=due_in(2 * TOKEN_S)) == Schedule()


def test_before_each_second_step_of_a_decoder_prefill_goes_on_though_it_does_not_fit() -> None:
    assert tokens_for(0, turn_of(prefill(0, passed_over=1), expected=due_in(2 * TOKEN_S))) > 0


def test_prefill_goes_on_when_a_decoder_is_late() -> None:
    assert tokens_for(0, turn_of(prefill(0), expected=ExpectedArrivals(((math.inf, 1),)))) > 0


def test_a_decode_step_that_has_waited_is_not_held_up_further() -> None:
    assert turn_of(decode(0, waited_s=2 * READING_S), prefill(1)) == Schedule((ScheduledTokens(0, 1),))


def test_a_prefill_is_not_left_out_for_long() -> None:
    assert tokens_for(1, turn_of(decode(0, waited_s=2 * READING_S), prefill(1, passed_over=2))) > 0


def test_before_anything_was_measured_prefill_beside_decode_is_careful() -> None:
    turn = next_schedule([decode(0), prefill(1, passed_over=2)], [], NOBODY, PassTimes(), LIMITS)
    assert 0 < tokens_for(1, turn) <= 16


# jobs


INTERACTIVE_JOB, BULK_JOB = WaitingJob(0, bulk=False, passed_over=0), WaitingJob(1, bulk=True, passed_over=0)


def test_a_job_runs_when_there_is_no_step() -> None:
    assert turn_of(jobs=(BULK_JOB,)) == Schedule(job=1)


def test_an_interactive_job_runs_before_a_bulk_one() -> None:
    assert turn_of(jobs=(BULK_JOB, INTERACTIVE_JOB)) == Schedule(job=0)


def test_a_job_lets_a_step_go_first() -> None:
    assert turn_of(decode(), jobs=(BULK_JOB, INTERACTIVE_JOB)) == Schedule((ScheduledTokens(0, 1),))


def test_an_interactive_job_runs_between_two_steps() -> None:
    assert turn_of(decode(), jobs=(replace(INTERACTIVE_JOB, passed_over=1),)) == Schedule(job=0)


def test_a_bulk_job_does_not_wait_for_ever() -> None:
    jobs = (replace(BULK_JOB, passed_over=100), replace(INTERACTIVE_JOB, passed_over=1))
    assert turn_of(decode(), jobs=jobs) == Schedule(job=1)


# nobody starves


@dataclass
class Work:
    """A step or a job of a simulated client."""

    client: str
    rows: int
    left: int
    decode: bool
    arrived: float
    job: bool = False
    passed_over: int = 0
    gaps: int = 0
    """The most turns that it was passed over in a row."""


class Simulation:
    """A device on which time passes as the model of `TIMES` says, and clients that come at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.waiting: list[Work] = []
        self.finished: list[Work] = []
        self.fair = FairShares()
        self.times = PassTimes()
        self.bulk_passed_over = 0

    def arrive(self) -> None:
        """One more piece of work, of any kind."""
        client = f"client {min(int(self.random.expovariate(0.5)), 9)}"  # some want far more than others
        kind = self.random.choices(["decode", "prefill", "job"], [8, 2, 1])[0]
        tokens = {"decode": self.random.randint(1, 16), "prefill": self.random.randint(17, 2000), "job": 0}[
            kind
        ]
        rows = self.random.choice([1, 1, 1, 4, 60])
        self.waiting.append(Work(client, rows, tokens, kind == "decode", self.now, job=kind == "job"))

    def turn(self) -> Schedule | None:
        steps = [work for work in self.waiting if not work.job]
        jobs = [work for work in self.waiting if work.job]
        served = self.fair.of_present(work.client for work in steps)
        turn = next_schedule(
            [
                WaitingStep(
                    key,
                    served[work.client],
                    work.rows,
                    work.left,
                    work.decode,
                    self.now - work.arrived,
                    work.passed_over,
                )
                for key, work in enumerate(steps)
            ],
            [WaitingJob(key, True, self.bulk_passed_over) for key, _ in enumerate(jobs)],
            NOBODY,
            self.times,
            LIMITS,
        )
        if turn is None:
            return None
        for work in steps:
            work.passed_over += 1
            work.gaps = max(work.gaps, work.passed_over)
        self.bulk_passed_over = 0 if turn.job is not None or not jobs else self.bulk_passed_over + 1
        if turn.job is not None:
            self.finish(jobs[turn.job])
            self.now += 0.05
            return turn
        total = 0
        for scheduled in turn.steps:
            work = steps[scheduled.key]
            work.left -= scheduled.tokens
            work.passed_over = 0
            total += scheduled.tokens * work.rows
            self.fair.serve(work.client, scheduled.tokens * work.rows)
            if not work.left:
                self.finish(work)
        self.times.learn(total, READING_S + total * TOKEN_S)
        self.now += READING_S + total * TOKEN_S
        return turn

    def finish(self, work: Work) -> None:
        self.waiting.remove(work)
        self.finished.append(work)


def seeds(count: int, quick: int) -> list[Any]:
    """The first few always, the others in test-all."""
    return [pytest.param(seed, marks=pytest.mark.slow) if seed >= quick else seed for seed in range(count)]


@pytest.mark.parametrize("seed", seeds(20, 6))
def test_everything_that_arrives_is_finished(seed: int) -> None:
    world = Simulation(seed)
    for _ in range(300):
        world.arrive()
        if world.random.random() < 0.8:
            world.turn()
    while world.turn() is not None:
        pass
    assert len(world.finished) == 300


@pytest.mark.parametrize("seed", seeds(20, 6))
def test_nobody_is_passed_over_without_end(seed: int) -> None:
    world = Simulation(seed)
    for _ in range(600):  # more comes than can be done
        world.arrive()
        world.arrive()
        world.turn()
    waited = [work.gaps for work in (*world.finished, *world.waiting) if work.decode]
    # Its turn comes after 16 others, and then those of its kind that wait as long go before it at most.
    assert max(waited) <= 16 + len(world.waiting)


@pytest.mark.parametrize("seed", range(10))
def test_two_clients_get_the_same_however_many_sessions_one_has(seed: int) -> None:
    world = Simulation(seed)
    for _ in range(7):
        world.waiting.append(Work("greedy", 1, 100_000, False, 0.0))
    world.waiting.append(Work("modest", 1, 100_000, False, 0.0))
    for _ in range(100):
        world.turn()
    left = {work.client: work.left for work in world.waiting}
    assert 100_000 - left["modest"] >= 0.45 * 100 * LIMITS.chunk_tokens


@pytest.mark.parametrize("seed", range(10))
def test_while_somebody_decodes_a_pass_takes_about_twice_as_long_at_most(seed: int) -> None:
    world = Simulation(seed)
    world.times = times_learnt()
    world.waiting.append(Work("long prompt", 1, 3000, False, 0.0))
    took = []
    while any(not work.decode for work in world.waiting):
        world.waiting.append(Work("decoder", 1, 1, True, world.now))
        before = world.now
        world.turn()
        took.append(world.now - before)
    assert max(took) <= 2.1 * (READING_S + TOKEN_S)


def test_a_long_prompt_beside_a_decoder_is_finished_in_time() -> None:
    world = Simulation(0)
    world.waiting.append(Work("long prompt", 1, 3000, False, 0.0))
    turns = 0
    while any(not work.decode for work in world.waiting):
        if not any(work.decode for work in world.waiting):
            world.waiting.append(Work("decoder", 1, 1, True, world.now))
        world.turn()
        turns += 1
    assert turns <= 2 * 3000 * TOKEN_S / READING_S


# shares


def test_a_newcomer_owes_and_is_owed_nothing() -> None:
    shares = FairShares()
    shares.of_present(["old"])
    shares.serve("old", 1000)
    assert shares.of_present(["old", "new"]) == {"old": 1000, "new": 1000}


def test_who_comes_back_still_has_what_was_taken() -> None:
    shares = FairShares()
    shares.of_present(["greedy", "modest"])
    shares.serve("greedy", 1000)
    shares.of_present(["modest"])
    assert shares.of_present(["greedy", "modest"]) == {"greedy": 1000, "modest": 0}


def test_when_nobody_has_stayed_all_begin_anew() -> None:
    shares = FairShares()
    shares.of_present(["greedy"])
    shares.serve("greedy", 1000)
    shares.of_present([])
    assert shares.of_present(["greedy", "new"]) == {"greedy": 0, "new": 0}


def test_clients_that_have_gone_are_forgotten() -> None:
    shares = FairShares()
    for client in range(10_000):
        shares.of_present(["always", f"client {client}"])
        shares.serve("always", 1)
        shares.serve(f"client {client}", 1)
    assert len(shares._served) < 1000


# who decodes


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


# times


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
    times = times_learnt()
    larger = 1024

    class Learning(Ewma):
        """Asked for its mean, it has the other thread learn a pass of a new size just then."""

        @property  # type: ignore[override]
        def mean(self) -> float:
            nonlocal larger
            larger *= 2
            times.learn(larger, READING_S + larger * TOKEN_S)
            return READING_S + TOKEN_S

        @mean.setter
        def mean(self, value: float) -> None:
            pass

    times._seen[1].seconds = Learning(READING_S, 0.0, 0.25)
    assert times.of(1) == pytest.approx(READING_S + TOKEN_S)


# several stages


def test_arrivals_at_several_stages_are_those_of_all() -> None:
    one, other = ExpectedArrivals(((0.5, 2),), 0.4), ExpectedArrivals(((0.1, 1), (0.9, 1)), 0.05)
    assert ExpectedArrivals.merged([one, other]) == ExpectedArrivals(((0.1, 1), (0.5, 2), (0.9, 1)), 0.05)


# attention


SHARED_KEYS = AttentionCost(reads=64.0, products=1000.0)
"""Of narrow blocks, in which attention soon outweighs the rest."""


def piece_of(step: WaitingStep, *others: WaitingStep, expected: ExpectedArrivals = NOBODY) -> ScheduledTokens:
    """What runs of a step, beside others."""
    turn = next_schedule((step, *others), (), expected, TIMES, LIMITS, SHARED_KEYS)
    assert turn is not None
    return next(piece for piece in turn.steps if piece.key == step.key)


def many_rows(**more: object) -> WaitingStep:
    return prefill(rows=256, tokens=1, **{"past": 1900, "cuts_rows": True, **more})


def work_of(piece: ScheduledTokens, step: WaitingStep) -> float:
    return SHARED_KEYS.work(piece.rows, piece.tokens, step.past)


def test_many_rows_over_a_long_past_are_no_decode_step() -> None:
    assert is_decode(256, 1, 30, SHARED_KEYS) is True
    assert is_decode(256, 1, 1900, SHARED_KEYS) is False


def test_one_row_decodes_however_long_its_past() -> None:
    assert is_decode(1, 1, 100_000, SHARED_KEYS) is True


def test_a_few_beams_decode() -> None:
    assert is_decode(8, 1, 1900, SHARED_KEYS) is True


def test_many_rows_over_a_long_past_are_cut_by_rows() -> None:
    piece = piece_of(many_rows())
    assert piece.tokens == 1
    assert 1 <= piece.rows < 256
    assert work_of(piece, many_rows()) <= LIMITS.chunk_tokens


def test_beside_a_decode_step_a_piece_takes_no_longer_than_the_slowdown_allows() -> None:
    step = many_rows(key=1, past=400)
    piece = piece_of(step, decode(0))
    together_s = READING_S + (1 + work_of(piece, step)) * TOKEN_S
    assert together_s <= LIMITS.decode_slowdown * (READING_S + TOKEN_S)


def test_where_rows_cannot_be_cut_all_go_on_by_a_token() -> None:
    assert piece_of(many_rows(cuts_rows=False)) == ScheduledTokens(0, 1, 256)


def test_the_rows_that_are_left_get_as_many_tokens_as_those_before_them() -> None:
    step = prefill(rows=100, tokens=7, past=1900, cuts_rows=True, keeps_tokens=True)
    assert piece_of(step).tokens == 7


def test_a_piece_is_never_empty() -> None:
    assert piece_of(many_rows(past=10**6)) == ScheduledTokens(0, 1, 1)


def test_a_long_prompt_is_cut_shorter_behind_a_long_past() -> None:
    soon = ExpectedArrivals(((0.5, 1),), 0.2)
    first, later = (piece_of(prefill(past=past, passed_over=1), expected=soon).tokens for past in (0, 10_000))
    assert first > later >= 1


def test_the_attention_of_a_prompt_that_delays_nobody_is_cut_only_where_it_is_most_of_the_work() -> None:
    assert piece_of(prefill(past=2000)).tokens == LIMITS.chunk_tokens
    assert piece_of(prefill(past=50_000)).tokens < LIMITS.chunk_tokens


def test_a_mask_has_a_bound() -> None:
    assert AttentionCost().tokens_within(math.inf, 1, 10**6, 512) == 67


# decode steps of several clients


def of_client(client: str, *keys: int, **more: object) -> list[WaitingStep]:
    return [decode(key, client=client, **more) for key in keys]


def keys_of(*steps: WaitingStep, expected: ExpectedArrivals = NOBODY) -> set[int]:
    turn = turn_of(*steps, expected=expected)
    assert turn is not None
    return {piece.key for piece in turn.steps}


def test_a_client_alone_decodes_in_all_of_its_sessions_together() -> None:
    assert len(keys_of(*of_client("one", *range(200)))) == 200


def test_a_client_with_many_sessions_takes_no_more_beside_another_than_the_slowdown_allows() -> None:
    keys = keys_of(*of_client("many", *range(200), passed_over=99), *of_client("one", 999))
    assert 999 in keys
    alone_s, together_s = (READING_S + tokens * TOKEN_S for tokens in (2, len(keys)))
    assert len(keys) > 2
    assert together_s <= LIMITS.decode_slowdown * alone_s


def test_it_takes_no_more_while_the_other_ones_step_is_expected() -> None:
    soon = ExpectedArrivals(((0.01, 1),), 0.01, (("one", 1),))
    keys = keys_of(*of_client("many", *range(200)), expected=soon)
    assert READING_S + len(keys) * TOKEN_S <= LIMITS.decode_slowdown * (READING_S + TOKEN_S)


def test_clients_with_as_many_sessions_each_all_decode_together() -> None:
    assert len(keys_of(*of_client("one", *range(50)), *of_client("other", *range(50, 100)))) == 100


def test_of_many_sessions_those_that_waited_longest_are_next() -> None:
    late = of_client("many", 7, passed_over=3)
    assert 7 in keys_of(*of_client("many", *range(100, 300)), *late, *of_client("one", 999))
