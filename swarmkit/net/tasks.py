"""Start a long-lived task on the background loop and wait until it says that it is ready."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from swarmkit.net.portal import Lease


class _Readiness:
    """An anyio `TaskStatus` that another thread waits for."""

    def __init__(self) -> None:
        self.ready: Future[None] = Future()

    def started(self, value: Any = None) -> None:
        if not self.ready.done():
            self.ready.set_result(None)


def start_task(lease: Lease, run: Callable[..., Awaitable[None]]) -> Future[None]:
    """Start `run(task_status=…)` and wait for its `task_status.started()`.

    Returns: a future of the task's end. Whatever `run` raises before it is ready is raised here.
    """
    status = _Readiness()

    async def call() -> None:
        await run(task_status=status)

    running = lease.start_task_soon(call)

    def ended(future: Future[None]) -> None:
        if status.ready.done():
            return
        error = None if future.cancelled() else future.exception()
        status.ready.set_exception(error or RuntimeError("the task ended before it was ready"))

    running.add_done_callback(ended)
    try:
        status.ready.result()
    except BaseException:
        running.cancel()
        raise
    return running
