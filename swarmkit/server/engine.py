"""One thread per device: work goes in, results come out, nothing else touches the device."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from swarmkit.errors import UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

INTERACTIVE = 0
"""Priority of a step of an open session: somebody is waiting for a token."""
BULK = 1
"""Priority of everything else."""


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

    A job that is cancelled before its turn is skipped; one that runs is finished, and its result dropped.
    """

    def __init__(self, name: str = "cpu") -> None:
        self._jobs: queue.PriorityQueue[_Work] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"swarmkit-engine-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return self._jobs.qsize()

    async def run(self, job: Callable[[], T], priority: int = INTERACTIVE) -> Timed[T]:
        """Run `job` on the engine's thread and wait for it.

        Raises:
            UsageError: the engine has been closed. Whatever the job raises is raised here too.
        """
        if self._closed:
            raise UsageError("the engine is closed; make a new server to go on serving")
        work = _Work(priority, next(self._numbers), job)
        self._jobs.put(work)
        return await asyncio.wrap_future(work.done)  # type: ignore[arg-type]

    def close(self) -> None:
        """Finish the job that runs, refuse the ones that wait, end the thread."""
        if not self._closed:
            self._closed = True
            self._jobs.put(_Work(-1, next(self._numbers), None))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            work = self._jobs.get()
            if work.run is None:
                break
            if not work.done.set_running_or_notify_cancel():
                continue
            started = time.perf_counter()
            try:
                value = work.run()
            except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
                work.done.set_exception(error)
            else:
                ended = time.perf_counter()
                work.done.set_result(Timed(value, started - work.queued_at, ended - started))
            del work
        while not self._jobs.empty():
            left = self._jobs.get_nowait()
            left.done.cancel()
