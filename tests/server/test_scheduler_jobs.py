"""When jobs run: between steps, and in the end, but not for more than their share of the time."""

from __future__ import annotations

from dataclasses import replace

from swarmkit.server.engine.scheduler import (
    ExpectedArrivals,
    JobTurns,
    Schedule,
    ScheduledTokens,
    WaitingJob,
)

from .scheduling import (
    decode,
    turn_of,
)

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


DECODES = ExpectedArrivals(((0.01, 1),), 0.01)
"""A session decodes, whose next step is not here yet."""


def test_a_bulk_job_that_has_had_its_share_rests_while_a_session_decodes() -> None:
    assert turn_of(jobs=(replace(BULK_JOB, rests=True),), expected=DECODES) == Schedule()


def test_it_rests_between_two_answers_of_a_client_too() -> None:
    jobs = (replace(BULK_JOB, rests=True),)
    assert turn_of(jobs=jobs, recent={"one": 1}) == Schedule()


def test_a_bulk_job_does_not_rest_where_nobody_decodes() -> None:
    assert turn_of(jobs=(replace(BULK_JOB, rests=True),)) == Schedule(job=1)


def test_what_waits_for_long_rests_all_the_same_while_a_session_decodes() -> None:
    jobs = (replace(BULK_JOB, passed_over=100, rests=True),)
    assert turn_of(decode(), jobs=jobs) == Schedule((ScheduledTokens(0, 1),))


def test_bulk_jobs_have_a_share_of_the_time_and_interactive_ones_all_that_they_need() -> None:
    turns, now, had_s = JobTurns(), 0.0, 0.0
    for _ in range(1000):
        interactive, bulk = turns.waiting([False, True], now)
        assert not interactive.rests
        if not bulk.rests:
            turns.ran(True, now, now + 0.05)
            now, had_s = now + 0.05, had_s + 0.05
        now += 0.001
    assert 0.28 < had_s / now < 0.32


def test_a_job_counts_the_turns_that_its_kind_has_waited_for() -> None:
    turns = JobTurns()
    turns.pass_over([False, True, True])
    turns.pass_over([True])
    turns.ran(False, 0.0, 0.1)
    assert [job.passed_over for job in turns.waiting([False, True], 1.0)] == [0, 2]
