"""Which of many waiting steps are looked at, and what a newcomer is told that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from swarmkit.net.transport.shares import Holder
from swarmkit.server.engine.scheduler import PassLimits
from swarmkit.server.engine.work import LearnedTimes, QueuedStep, WorkAhead, in_turn

from .scheduling import named

pytestmark = pytest.mark.asyncio

LIMITS = PassLimits(chunk_tokens=512, decode_slowdown=1.6)


@dataclass
class Task:
    """A decode step of a session, as far as the engine's queue looks at it."""

    client: Holder
    shape: tuple[int, int] = (1, 1)
    past: int = 4
    session: object = field(default_factory=object)


@pytest.fixture
def learned() -> LearnedTimes:
    learned = LearnedTimes(torch.device("cpu"), lambda: 0.0)
    for tokens in (1, 512):
        learned.times.learn(tokens, 0.001 * tokens)
    return learned


def steps_of(learned: LearnedTimes, client: str, number: int, **more: Any) -> list[QueuedStep]:
    return [QueuedStep(Task(named(client), **more), 0.0, learned, 0.0) for _ in range(number)]  # type: ignore[arg-type]


def looked_at(steps: Sequence[QueuedStep], **recent: int) -> list[int]:
    """Args: recent: the tokens of the latest step of clients that have decoded lately."""
    return [
        key for key, _ in in_turn(steps, LIMITS, {named(client): tokens for client, tokens in recent.items()})
    ]


async def test_of_a_crowd_beside_another_client_those_are_looked_at_that_a_pass_can_have(
    learned: LearnedTimes,
) -> None:
    crowd, one = steps_of(learned, "many", 1000), steps_of(learned, "one", 1)
    # A pass over two tokens takes 2 ms, their messages as long; 30 % more for others, and a millisecond each.
    assert looked_at([*crowd, *one]) == [*range(7), 1000]
    assert looked_at(crowd, one=1, many=1) == [*range(7)]


async def test_two_clients_with_many_sessions_each_have_as_many_looked_at(learned: LearnedTimes) -> None:
    steps = [*steps_of(learned, "many", 50), *steps_of(learned, "more", 100)]
    assert len(looked_at(steps)) == 50 + 64


async def test_a_client_whose_sessions_are_away_has_as_many_of_a_crowd_looked_at(
    learned: LearnedTimes,
) -> None:
    for session in range(30):
        learned.arrivals.decoded(session, 1, 0.0, 0.0, named("other"))
    assert len(looked_at(steps_of(learned, "many", 1000), other=1)) >= 30


async def test_before_anything_was_measured_many_of_a_crowd_are_looked_at() -> None:
    unknown = LearnedTimes(torch.device("cpu"), lambda: 0.0)
    steps = [*steps_of(unknown, "many", 1000), *steps_of(unknown, "one", 1)]
    assert looked_at(steps) == [*range(64), 1000]


async def test_a_client_alone_has_all_steps_looked_at_that_fit_into_a_pass(learned: LearnedTimes) -> None:
    assert looked_at(steps_of(learned, "many", 1000)) == [*range(256)]


async def test_of_a_clients_prompts_those_are_looked_at_that_may_fit_into_a_chunk(
    learned: LearnedTimes,
) -> None:
    prompts = steps_of(learned, "many", 100, shape=(1, 17))
    assert len(looked_at([*prompts, *steps_of(learned, "one", 1, shape=(1, 100))])) == 33 + 1


async def test_a_prompt_is_looked_at_however_small_a_chunk_is(learned: LearnedTimes) -> None:
    (prompt,) = steps_of(learned, "one", 1, shape=(1, 100))
    assert len(list(in_turn([prompt], PassLimits(chunk_tokens=1, decode_slowdown=1.6)))) == 1


def crowd(learned: LearnedTimes, clients: int) -> list[QueuedStep]:
    return [step for client in range(clients) for step in steps_of(learned, f"client {client}", 1)]


async def test_a_crowd_is_not_counted_anew_for_each_that_comes(learned: LearnedTimes) -> None:
    ahead, few, many = WorkAhead(), crowd(learned, 40), crowd(learned, 80)
    at_first = ahead.of(few, 1, 1, named("one"), 512, now=0.0)
    assert at_first.steps == 40
    assert at_first.wait_s == pytest.approx(0.04)
    assert ahead.of(many, 1, 1, named("one"), 512, now=0.001).wait_s == at_first.wait_s
    assert ahead.of(many, 1, 1, named("one"), 512, now=0.03).wait_s == pytest.approx(0.08)


async def test_a_token_does_not_wait_for_all_sessions_of_another_client(learned: LearnedTimes) -> None:
    few, many = (
        WorkAhead().of(steps_of(learned, "many", number), 1, 1, named("one"), 512, now=0.0)
        for number in (16, 500)
    )
    assert many.wait_s == few.wait_s


async def test_a_token_waits_for_all_sessions_of_its_own_client(learned: LearnedTimes) -> None:
    ahead = WorkAhead().of(steps_of(learned, "many", 500), 1, 1, named("many"), 512, now=0.0)
    assert ahead.wait_s == pytest.approx(0.5)


async def test_a_very_large_crowd_is_counted_less_often(learned: LearnedTimes) -> None:
    ahead, many = WorkAhead(), steps_of(learned, "many", 1000)
    at_first = ahead.of(many, 1, 1, named("many"), 512, now=0.0)
    for step in many:
        step.tokens_done = 1
    assert ahead.of(many, 1, 1, named("many"), 512, now=0.09) == at_first
    assert ahead.of(many, 1, 1, named("many"), 512, now=0.11).wait_s == 0.0


async def test_a_prompt_is_told_what_it_would_wait_for_when_many_have_come(learned: LearnedTimes) -> None:
    ahead, few, many = WorkAhead(), steps_of(learned, "many", 40), steps_of(learned, "many", 80)
    ahead.of(few, 1, 1, named("one"), 512, now=0.0)
    assert ahead.of(many, 1, 100, named("one"), 512, now=0.001).wait_s == pytest.approx(0.08)


async def test_a_token_does_not_wait_for_all_names_of_another_host(learned: LearnedTimes) -> None:
    waits = []
    for number in (16, 500):
        names = [
            QueuedStep(Task(named(f"name {name}", "stranger")), 0.0, learned, 0.0)  # type: ignore[arg-type]
            for name in range(number)
        ]
        waits.append(WorkAhead().of(names, 1, 1, named("one", "honest"), 512, now=0.0).wait_s)
    assert waits[0] == waits[1] == pytest.approx(0.016)


async def test_a_prompt_waits_for_as_much_of_another_host_as_it_has_itself(learned: LearnedTimes) -> None:
    names = [
        QueuedStep(Task(named(f"name {name}", "stranger"), (1, 100)), 0.0, learned, 0.0)  # type: ignore[arg-type]
        for name in range(50)
    ]
    ahead = WorkAhead().of(names, 1, 100, named("one", "honest"), 512, now=0.0)
    assert ahead.wait_s == pytest.approx(0.1)
