"""Steps and jobs that wait, and how long passes take, for the tests of what runs next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from swarmkit.net.transport.shares import Holder
from swarmkit.server.engine.scheduler import (
    ExpectedArrivals,
    PassLimits,
    PassTimes,
    Schedule,
    ServedBefore,
    WaitingJob,
    WaitingStep,
    next_schedule,
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


def named(client: str, host: str = "") -> Holder:
    """A client, by its name."""
    return Holder(host, client)


def decode(key: int = 0, served: float = 0, rows: int = 1, tokens: int = 1, **more: object) -> WaitingStep:
    return replace(WaitingStep(key, ServedBefore(0.0, served), rows, tokens, True, 0.0, 0), **more)  # type: ignore[arg-type]


def prefill(
    key: int = 0, tokens: int = 4096, served: float = 0, rows: int = 1, **more: object
) -> WaitingStep:
    return replace(WaitingStep(key, ServedBefore(0.0, served), rows, tokens, False, 0.0, 0), **more)  # type: ignore[arg-type]


def turn_of(
    *steps: WaitingStep,
    jobs: tuple[WaitingJob, ...] = (),
    expected: ExpectedArrivals = NOBODY,
    **more: Any,
) -> Schedule | None:
    return next_schedule(steps, jobs, expected, TIMES, LIMITS, **more)


def tokens_for(key: int, turn: Schedule | None) -> int:
    assert turn is not None
    return sum(scheduled.tokens for scheduled in turn.steps if scheduled.key == key)
