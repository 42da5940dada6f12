"""How a step ends before its time: what is cancelled here stops at the servers too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import anyio

from swarmkit.client.session.remote_stage import RemoteStage
from swarmkit.errors import DeadlineError


@contextmanager
def interruptible(stages: Callable[[], Sequence[RemoteStage]], seconds: float | None) -> Iterator[None]:
    """Around a step. If it is cancelled, nothing that any server still has to do for it is done.

    Args:
        stages: those of the step's session, when it ends.
        seconds: after which the step is given up; None = never.

    Raises:
        DeadlineError: it was.
    """
    if seconds is None:
        with _abandoning(stages):
            yield
        return
    try:
        with anyio.fail_after(seconds), _abandoning(stages):
            yield
    except DeadlineError:
        raise
    except TimeoutError:
        raise DeadlineError(
            f"a step was not done within the step_deadline_s of {seconds:g} s; try again, or allow more"
        ) from None


@contextmanager
def _abandoning(stages: Callable[[], Sequence[RemoteStage]]) -> Iterator[None]:
    try:
        yield
    except anyio.get_cancelled_exc_class():
        for stage in stages():
            stage.abandon()
        raise
