"""One background event loop per process, with a synchronous face for notebooks and scripts.

The loop's thread starts with the first lease and ends with the last one. What a lease started ends with it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortalProvider

from swarmkit.errors import UsageError

_T = TypeVar("_T")

THREAD_NAME = "swarmkit-loop"
_CLEANUP_TIMEOUT_S = 10.0  # for what was cancelled; a coroutine that will not end must not hang its caller

_provider = BlockingPortalProvider(backend="asyncio")


def lease() -> PortalLease:
    """Hold the background loop, which is started if it is not held yet. Close the lease when done."""
    return PortalLease()


class PortalLease:
    """A share in the background loop; a context manager."""

    def __init__(self) -> None:
        self._provider = _provider
        self._portal = _provider.__enter__()
        self._open = True
        self._lock = threading.Lock()
        self._running: set[_Call[Any]] = set()
        self._thread, self._loop = self._portal.call(_introduce_loop_thread)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The background loop."""
        return self._loop

    def call(self, function: Callable[..., Awaitable[_T]], *args: object) -> _T:
        """Run `await function(*args)` on the loop and wait for its result.

        If the waiting is interrupted (Ctrl-C), what was called is cancelled.

        Raises:
            UsageError: called from the loop's own thread, which cannot wait for itself; or after `close`.
        """
        self._check_thread()
        call = self._submit(functools.partial(function, *args))
        return self._wait(call.future, call)

    def start_task_soon(
        self, function: Callable[..., Awaitable[_T]], *args: object
    ) -> concurrent.futures.Future[_T]:
        """Run `await function(*args)` on the loop. Cancelling the future cancels it; so does `close`.

        Raises:
            UsageError: after `close`.
        """
        return self._submit(functools.partial(function, *args)).future

    def start_task(
        self, function: Callable[..., Awaitable[_T]], *args: object
    ) -> tuple[concurrent.futures.Future[_T], Any]:
        """Run `await function(*args, task_status=…)` and wait until it calls `task_status.started(value)`.

        Returns: the future of the task's own end, and `value`.

        Raises:
            UsageError: called from the loop's own thread, or after `close`.
            RuntimeError: the task ended without saying that it had started.
            Exception: what the task raised before it had started.
        """
        self._check_thread()
        started: concurrent.futures.Future[Any] = concurrent.futures.Future()
        call = self._submit(functools.partial(function, *args, task_status=_Started(started)))

        def ended_early(future: concurrent.futures.Future[_T]) -> None:
            if started.done():
                return
            if future.cancelled():
                started.cancel()
            else:
                started.set_exception(
                    future.exception() or RuntimeError("the task ended before it said that it had started")
                )

        call.future.add_done_callback(ended_early)
        return call.future, self._wait(started, call)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the loop call `function`, some time.

        Never waits and never raises, also when the loop is gone: made for finalizers, which the garbage
        collector may run in any thread at any time, the loop's own included.
        """
        if self._provider is not _provider:
            return  # a forked child: the loop stayed with the parent
        with contextlib.suppress(RuntimeError):  # the loop is closed, and what was to be ended ended with it
            self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Give the loop back: cancel what this lease started, wait for that, and if this was the last
        lease, end the loop and its thread. May be called twice.

        Raises:
            UsageError: called from the loop's own thread, which cannot wait for its own end.
        """
        if self._provider is not _provider:
            self._open = False
            return
        if threading.current_thread() is self._thread:
            raise UsageError("the background loop cannot be given back from its own thread")
        with self._lock:
            if not self._open:
                return
            self._open = False
            running = list(self._running)
        try:
            for call in running:
                call.future.cancel()
            for call in running:
                call.ended.wait(_CLEANUP_TIMEOUT_S)
        finally:
            self._provider.__exit__(None, None, None)
            if self._loop.is_closed():
                _join_worker_threads(self._loop)

    def __enter__(self) -> PortalLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, function: Callable[[], Awaitable[_T]]) -> _Call[_T]:
        if self._provider is not _provider:
            raise UsageError(
                "this process was forked from the one that holds the loop; make the object anew here, "
                "or start processes with the 'spawn' method"
            )
        call = _Call(self._loop, function, self._forget)
        with self._lock:
            if not self._open:
                raise UsageError("this object was closed; make a new one")
            self._running.add(call)
        # one hop to the loop and one back, where the portal's own `call` takes two
        self._loop.call_soon_threadsafe(call.start)
        return call

    def _wait(self, future: concurrent.futures.Future[_T], call: _Call[Any]) -> _T:
        try:
            return future.result()
        except BaseException:
            if not call.ended.is_set():
                call.future.cancel()
                call.ended.wait(_CLEANUP_TIMEOUT_S)
            raise

    def _check_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise UsageError(
                "a synchronous call was made from swarmkit's own event loop, which would wait for itself "
                "for ever; await the asynchronous form there"
            )

    def _forget(self, call: _Call[Any]) -> None:
        with self._lock:
            self._running.discard(call)


class _Call(Generic[_T]):
    """One coroutine on the loop, and the news of its end (a future is done as soon as it is cancelled)."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: Callable[[], Awaitable[_T]],
        on_end: Callable[[_Call[_T]], None],
    ) -> None:
        self._loop = loop
        self._function = function
        self._on_end = on_end
        self.future: concurrent.futures.Future[_T] = concurrent.futures.Future()
        self.ended = threading.Event()

    def start(self) -> None:
        """Begin; to be called on the loop."""
        task = self._loop.create_task(self._run())
        task.add_done_callback(self._finish)
        # A future keeps its callbacks. If they referred to this call, both would be garbage that Python finds
        # only much later, and with them what the function refers to, such as a session.
        self.future.add_done_callback(functools.partial(_pass_on_cancel, self._loop, task))

    async def _run(self) -> _T:
        return await self._function()

    def _finish(self, task: asyncio.Task[_T]) -> None:
        if task.cancelled():
            self.future.cancel()
        error = None if task.cancelled() else task.exception()  # fetched even if no caller asks for it
        self._on_end(self)
        self.ended.set()
        if self.future.set_running_or_notify_cancel():
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(task.result())


def _pass_on_cancel(
    loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], future: concurrent.futures.Future[Any]
) -> None:
    if future.cancelled():
        with contextlib.suppress(RuntimeError):  # the loop is gone, and the task with it
            loop.call_soon_threadsafe(task.cancel)


class _Started(TaskStatus[Any]):
    """What a task calls to say that it is ready."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._future = future

    def started(self, value: object = None) -> None:
        if not self._future.done():
            self._future.set_result(value)


def _introduce_loop_thread() -> tuple[threading.Thread, asyncio.AbstractEventLoop]:
    thread = threading.current_thread()
    thread.name = THREAD_NAME
    return thread, asyncio.get_running_loop()


def _join_worker_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Wait for the threads in which anyio ran functions for this loop.

    anyio tells them to end with the loop, and does not wait until they have.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and getattr(thread, "loop", None) is loop:
            thread.join(_CLEANUP_TIMEOUT_S)


def _forget_parent() -> None:
    """In a forked child the loop's thread does not exist: begin anew."""
    global _provider
    _provider = BlockingPortalProvider(backend="asyncio")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
