"""One thread per device: work goes in, results come out, nothing else touches the device."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio
import torch

from swarmkit.errors import UsageError

logger = logging.getLogger(__name__)


T = TypeVar("T")

INTERACTIVE = 0
"""Priority of a step of an open session: somebody is waiting for a token."""
BULK = 1
"""Priority of everything else."""


class EngineClosedError(UsageError):
    """The engine ended before the job's turn came."""


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A result, and the seconds it waited and ran."""

    value: T
    queue_s: float
    compute_s: float


@dataclass(order=True)
class _Work:
    priority: int
    number: int
    run: Callable[[], object] | None = field(compare=False)
    done: Future[Timed[object]] = field(compare=False, default_factory=Future)
    queued_at: float = field(compare=False, default_factory=time.perf_counter)


class Engine:
    """A thread that runs jobs one after another, the smallest priority number first, else in order.

    A job that is cancelled before its turn is skipped. One that runs is finished, and its result dropped; its
    caller is held until then, so that whatever the job uses is in use for no longer than `run` takes.
    """

    def __init__(self, name: str = "cpu") -> None:
        self._jobs: queue.PriorityQueue[_Work] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._closed = False
        self._lock = threading.Lock()  # nothing may slip in behind the job that ends the thread
        self._thread = threading.Thread(target=self._run, name=f"swarmkit-engine-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return self._jobs.qsize()

    async def run(self, job: Callable[[], T], priority: int = INTERACTIVE) -> Timed[T]:
        """Run `job` on the engine's thread and wait for it.

        Raises:
            EngineClosedError: the engine has been closed. Whatever the job raises is raised here too.
        """
        work = _Work(priority, next(self._numbers), job)
        with self._lock:
            if self._closed:
                raise _closed()
            self._jobs.put(work)
        done: Future[Timed[T]] = work.done  # type: ignore[assignment]
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            if not done.cancel():
                await _ended(done)
            raise

    def close(self) -> None:
        """Finish the job that runs, refuse the ones that wait, end the thread. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(_Work(-1, next(self._numbers), None))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        # torch learns how many threads it may use in each thread at its first parallel loop; matrix products
        # before that would use another number, and differ in their last bits from all later ones.
        torch.get_num_threads()
        while self._run_next():
            pass
        while not self._jobs.empty():
            left = self._jobs.get_nowait()
            if left.done.set_running_or_notify_cancel():
                left.done.set_exception(_closed())

    def _run_next(self) -> bool:
        """Run one job; false for the one that says to end.

        A function of its own, so that nothing of a job (tensors, mostly) is held while waiting for the next.
        """
        work = self._jobs.get()
        if work.run is None:
            return False
        if not work.done.set_running_or_notify_cancel():
            return True
        started = time.perf_counter()
        try:
            value = work.run()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            work.done.set_exception(error)
        else:
            ended = time.perf_counter()
            work.done.set_result(Timed(value, started - work.queued_at, ended - started))
        return True


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine is closed; make a new server to go on serving")


async def _ended(done: Future[Timed[T]]) -> None:
    """Wait for the end of a job that runs, whatever happens to the one who waits."""
    waiter = asyncio.wrap_future(done)
    with anyio.CancelScope(shield=True):
        while not waiter.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([waiter])
    if not waiter.cancelled():
        waiter.exception()  # looked at, lest asyncio complains that nobody did
