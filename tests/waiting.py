"""Waits that end: what does not come about within a limit fails the test and says what was missing."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

WITHIN = 60.0
"""Seconds after which a wait fails: far more than any needs, also on a machine that is busy."""

Condition = Callable[[], Any]


def _failure(what: str, within: float) -> AssertionError:
    return AssertionError(f"did not come about within {within:g} s: {what}")


async def eventually(
    condition: Condition | Callable[[], Awaitable[Any]], what: str, *, within: float = WITHIN
) -> None:
    """Let the event loop run until `condition()` is true; the condition may be a coroutine function.

    Raises `AssertionError` with `what` when the condition is still false after `within` seconds.
    """
    now = asyncio.get_running_loop().time
    limit = now() + within
    checks = 0
    while True:
        holds = condition()
        if inspect.isawaitable(holds):
            holds = await holds
        if holds:
            return
        if now() > limit:
            raise _failure(what, within)
        checks += 1
        await asyncio.sleep(0 if checks < 50 else 0.001)  # most come about within a few turns of the loop


def wait_until(condition: Condition, what: str, *, within: float = WITHIN, every: float = 0.005) -> None:
    """Block this thread until `condition()` is true, for what other threads or processes do.

    `every` is the time between two looks, in seconds.

    Raises `AssertionError` with `what` when the condition is still false after `within` seconds.
    """
    limit = time.monotonic() + within
    while not condition():
        if time.monotonic() > limit:
            raise _failure(what, within)
        time.sleep(every)
