"""One thread per device: work goes in, results come out, nothing else touches the device."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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


class _Work:
    """A job on its way from the event loop to the engine's thread and back.

    `claim` is taken once, by the engine to run the job or by its caller to withdraw it. All else but `run`
    and `queued_at` belongs to the event loop's thread.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.claim = threading.Lock()
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Timed[Any]] = self.loop.create_future()
        self.ended = False
        self.after: asyncio.Future[None] | None = None
        self.queued_at = time.perf_counter()

    def settle(self, value: Timed[Any] | None, error: BaseException | None) -> None:
        """From any thread: hand the outcome to whoever waits."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self.loop.call_soon_threadsafe(self._settle, value, error)

    def _settle(self, value: Timed[Any] | None, error: BaseException | None) -> None:
        self.ended = True
        if self.after is not None and not self.after.done():
            self.after.set_result(None)
        if self.done.done():
            return  # its caller was cancelled meanwhile
        if error is not None:
            self.done.set_exception(error)
        else:
            assert value is not None
            self.done.set_result(value)

    async def wait_until_ended(self) -> None:
        """Wait for the end of a job that runs, whatever happens to the one who waits."""
        with anyio.CancelScope(shield=True):
            while not self.ended:
                if self.after is None or self.after.done():
                    self.after = self.loop.create_future()
                with contextlib.suppress(asyncio.CancelledError):
                    await self.after


class Engine:
    """A thread that runs jobs one after another, the smallest priority number first, else in order.

    A job that is cancelled before its turn is skipped. One that runs is finished, and its result dropped; its
    caller is held until then, so that whatever the job uses is in use for no longer than `run` takes.
    """

    def __init__(self, name: str = "cpu") -> None:
        self._jobs: tuple[deque[_Work], ...] = (deque(), deque())
        self._bell: queue.SimpleQueue[bool] = queue.SimpleQueue()  # a ring per job; false: no more will come
        self._closed = False
        self._lock = threading.Lock()  # nothing may slip in behind the ring that ends the thread
        self._thread = threading.Thread(target=self._run, name=f"swarmkit-engine-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return sum(len(jobs) for jobs in self._jobs)

    async def run(self, job: Callable[[], T], priority: int = INTERACTIVE) -> Timed[T]:
        """Run `job` on the engine's thread and wait for it.

        Raises:
            EngineClosedError: the engine has been closed. Whatever the job raises is raised here too.
        """
        work = _Work(job)
        with self._lock:
            if self._closed:
                raise _closed()
            self._jobs[priority].append(work)
            self._bell.put(True)
        try:
            return await work.done
        except asyncio.CancelledError:
            if not work.claim.acquire(blocking=False):
                await work.wait_until_ended()
            raise

    def close(self) -> None:
        """Finish the job that runs, refuse the ones that wait, end the thread. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for jobs in self._jobs:
                    while jobs:
                        work = jobs.popleft()
                        if work.claim.acquire(blocking=False):
                            work.settle(None, _closed())
                self._bell.put(False)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        # torch learns how many threads it may use in each thread at its first parallel loop; matrix products
        # before that would use another number, and differ in their last bits from all later ones.
        torch.get_num_threads()
        while self._bell.get():
            self._run_next()

    def _run_next(self) -> None:
        """Run one job.

        A function of its own, so that nothing of a job (tensors, mostly) is held while waiting for the next.
        """
        work = self._next()
        if work is None or not work.claim.acquire(blocking=False):
            return
        started = time.perf_counter()
        try:
            value = work.run()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            work.settle(None, error)
        else:
            ended = time.perf_counter()
            work.settle(Timed(value, started - work.queued_at, ended - started), None)

    def _next(self) -> _Work | None:
        for jobs in self._jobs:
            with contextlib.suppress(IndexError):  # empty, or emptied by `close`
                return jobs.popleft()
        return None


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine is closed; make a new server to go on serving")
