"""The background event loop and its synchronous face."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import anyio.to_thread
import pytest

from swarmkit.errors import UsageError
from swarmkit.net import portal

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def lease() -> Iterator[portal.PortalLease]:
    with portal.lease() as lease:
        yield lease


async def add(a: int, b: int) -> int:
    return a + b


async def fail() -> None:
    raise LookupError("no")


async def thread_name() -> str:
    return threading.current_thread().name


class Sleeper:
    """Sleeps until it is cancelled."""

    def __init__(self) -> None:
        self.started, self.cancelled = threading.Event(), threading.Event()

    async def __call__(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == portal.THREAD_NAME]


def test_a_call_returns_what_the_coroutine_returns(lease: portal.PortalLease) -> None:
    assert lease.call(add, 2, 3) == 5


def test_a_call_raises_what_the_coroutine_raises(lease: portal.PortalLease) -> None:
    with pytest.raises(LookupError, match="no"):
        lease.call(fail)


def test_calls_run_on_the_loops_thread(lease: portal.PortalLease) -> None:
    assert lease.call(thread_name) == "swarmkit-loop"


def test_leases_share_one_loop(lease: portal.PortalLease) -> None:
    with portal.lease() as other:
        assert other.loop is lease.loop


def test_the_loop_outlives_a_lease_that_is_not_the_last() -> None:
    with portal.lease() as outer:
        portal.lease().close()
        assert outer.call(add, 1, 1) == 2


def test_the_last_lease_ends_the_thread() -> None:
    portal.lease().close()
    assert loop_threads() == []


def test_the_last_lease_waits_for_threads_that_worked_for_the_loop() -> None:
    running = threading.Event()

    def work() -> threading.Thread:
        running.set()
        time.sleep(0.2)  # still at work when the loop has ended
        return threading.current_thread()

    with portal.lease() as lease:
        lease.start_task_soon(functools.partial(anyio.to_thread.run_sync, work, abandon_on_cancel=True))
        assert running.wait(5)
        workers = [t for t in threading.enumerate() if getattr(t, "loop", None) is lease.loop]
    assert workers
    assert not any(worker.is_alive() for worker in workers)


def test_a_new_lease_starts_a_new_loop() -> None:
    portal.lease().close()
    with portal.lease() as lease:
        assert lease.call(add, 1, 1) == 2


def test_a_lease_may_be_closed_twice(lease: portal.PortalLease) -> None:
    other = portal.lease()
    other.close()
    other.close()
    assert lease.call(add, 1, 1) == 2


def test_a_closed_lease_says_so() -> None:
    lease = portal.lease()
    lease.close()
    with pytest.raises(UsageError, match="closed"):
        lease.call(add, 1, 1)


def test_a_call_from_the_loop_itself_is_refused(lease: portal.PortalLease) -> None:
    async def call_again() -> int:
        return lease.call(add, 1, 1)

    with pytest.raises(UsageError, match="event loop"):
        lease.call(call_again)


def test_a_close_from_the_loop_itself_is_refused(lease: portal.PortalLease) -> None:
    async def close() -> None:
        lease.close()

    with pytest.raises(UsageError, match="own thread"):
        lease.call(close)


def test_many_threads_may_call_at_once(lease: portal.PortalLease) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        sums = list(pool.map(lambda number: lease.call(add, number, 1), range(500)))
    assert sums == [number + 1 for number in range(500)]


# tasks


def test_a_task_runs_in_the_background(lease: portal.PortalLease) -> None:
    assert lease.start_task_soon(add, 2, 3).result(10) == 5


def test_cancelling_a_tasks_future_cancels_the_task(lease: portal.PortalLease) -> None:
    sleeper = Sleeper()
    future = lease.start_task_soon(sleeper)
    sleeper.started.wait(10)
    future.cancel()
    assert sleeper.cancelled.wait(10)


def test_closing_a_lease_cancels_its_tasks(lease: portal.PortalLease) -> None:
    sleeper, other = Sleeper(), portal.lease()
    other.start_task_soon(sleeper)
    sleeper.started.wait(10)
    other.close()
    assert sleeper.cancelled.is_set()


def test_closing_a_lease_spares_the_tasks_of_others(lease: portal.PortalLease) -> None:
    sleeper, other = Sleeper(), portal.lease()
    lease.start_task_soon(sleeper)
    other.close()
    assert not sleeper.cancelled.is_set()


def test_a_task_cancelled_before_it_began_does_not_hold_up_a_close() -> None:
    lease = portal.lease()
    lease.start_task_soon(Sleeper()).cancel()
    lease.close()
    assert loop_threads() == []


def test_a_started_task_hands_over_a_value_and_goes_on(lease: portal.PortalLease) -> None:
    async def run(word: str, *, task_status: Any) -> str:
        task_status.started(word)
        await asyncio.sleep(0)
        return "end"

    future, value = lease.start_task(run, "ready")
    assert (value, future.result(10)) == ("ready", "end")


def test_a_task_that_fails_before_it_started_raises_at_its_starter(lease: portal.PortalLease) -> None:
    async def run(*, task_status: Any) -> None:
        raise LookupError("no")

    with pytest.raises(LookupError):
        lease.start_task(run)


def test_a_task_that_never_says_it_started_is_an_error(lease: portal.PortalLease) -> None:
    async def run(*, task_status: Any) -> None:
        return

    with pytest.raises(RuntimeError, match="before it said"):
        lease.start_task(run)


# interruptions


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupted_call_cancels_its_coroutine(lease: portal.PortalLease) -> None:
    cancelled = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    async def interrupt_the_caller() -> None:
        asyncio.get_running_loop().call_later(0.05, signal.pthread_kill, main, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        lease.call(interrupt_the_caller)
    assert cancelled.is_set()


# finalizers


def test_call_soon_runs_on_the_loop(lease: portal.PortalLease) -> None:
    names: list[str] = []
    done = threading.Event()
    lease.call_soon(lambda: (names.append(threading.current_thread().name), done.set()))
    done.wait(10)
    assert names == ["swarmkit-loop"]


def test_call_soon_is_quiet_once_the_loop_is_gone() -> None:
    lease = portal.lease()
    lease.close()
    lease.call_soon(lambda: None)


def test_call_soon_may_be_used_by_a_finalizer_on_the_loop_itself(lease: portal.PortalLease) -> None:
    done = threading.Event()

    class Garbage:
        def __init__(self) -> None:
            self.self = self

        def __del__(self) -> None:
            lease.call_soon(done.set)

    async def collect() -> None:
        Garbage()
        gc.collect()

    lease.call(collect)
    assert done.wait(10)


def test_what_was_called_is_let_go_when_it_has_answered(lease: portal.PortalLease) -> None:
    class Called:
        async def answer(self) -> int:
            return 1

    def call() -> weakref.ref[Called]:
        called = Called()
        lease.call(called.answer)
        return weakref.ref(called)

    gc.disable()  # which would find it sooner or later
    try:
        called = call()
        lease.call(add, 1, 1)  # so that the loop has left the task before
        assert called() is None
    finally:
        gc.enable()


# forks


def _in_child(lease: portal.PortalLease, what: str, answers: Any) -> None:
    try:
        if what == "old":
            lease.call(add, 1, 1)
        elif what == "close":
            lease.call_soon(lambda: None)
            lease.close()
            answers.put("quiet")
        else:
            with portal.lease() as fresh:
                answers.put(str(fresh.call(add, 1, 1)))
    except UsageError as error:
        answers.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("what", "answer"), [("old", "forked"), ("new", "2"), ("close", "quiet")])
def test_a_forked_child_does_not_use_its_parents_loop(
    lease: portal.PortalLease, what: str, answer: str
) -> None:
    context: Any = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(lease, what, answers))
    child.start()
    child.join(10)
    assert child.exitcode == 0
    assert answer in answers.get()
