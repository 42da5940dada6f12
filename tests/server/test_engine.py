"""The one thread that computes: order, priority, cancelling, errors, the end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator

import pytest

from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.work import BULK, INTERACTIVE, EngineClosedError

from ..waiting import eventually


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine("test")
    yield engine
    await asyncio.to_thread(engine.close)


class Gate:
    """A job that runs until it is let through."""

    def __init__(self, engine: Engine) -> None:
        self._entered = threading.Event()
        self._let_through = threading.Event()
        self.result = asyncio.create_task(engine.run(self._wait))

    async def entered(self) -> Gate:
        await asyncio.to_thread(self._entered.wait)
        return self

    def let_through(self) -> None:
        self._let_through.set()

    def _wait(self) -> str:
        self._entered.set()
        self._let_through.wait()
        return "through"


async def queued(engine: Engine, jobs: int) -> None:
    await eventually(lambda: engine.waiting >= jobs, "the jobs wait")


async def test_a_job_gives_its_result(engine: Engine) -> None:
    assert (await engine.run(lambda: 6 * 7)).value == 42


async def test_every_job_runs_on_the_same_thread(engine: Engine) -> None:
    threads = {(await engine.run(threading.get_ident)).value for _ in range(3)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_an_error_is_raised_where_the_job_was_asked_for(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        await engine.run(lambda: 1 // 0)


async def test_jobs_go_on_after_an_error(engine: Engine) -> None:
    await asyncio.gather(engine.run(lambda: 1 // 0), return_exceptions=True)
    assert (await engine.run(lambda: 1)).value == 1


async def test_jobs_run_in_the_order_in_which_they_came(engine: Engine) -> None:
    gate, ran = await Gate(engine).entered(), []
    jobs = [asyncio.create_task(engine.run(lambda number=number: ran.append(number))) for number in range(5)]
    await queued(engine, 5)
    gate.let_through()
    await asyncio.gather(*jobs)
    assert ran == [0, 1, 2, 3, 4]


async def test_an_interactive_job_overtakes_bulk(engine: Engine) -> None:
    gate, ran = await Gate(engine).entered(), []
    jobs = [
        asyncio.create_task(engine.run(lambda name=name: ran.append(name), priority))
        for name, priority in (("bulk", BULK), ("one", INTERACTIVE), ("two", INTERACTIVE))
    ]
    await queued(engine, 3)
    gate.let_through()
    await asyncio.gather(*jobs)
    assert ran == ["one", "two", "bulk"]


async def test_waiting_and_running_are_timed_apart(engine: Engine) -> None:
    timed = await engine.run(lambda: None)
    assert timed.queue_s >= 0
    assert timed.compute_s >= 0


# cancelling


async def test_a_job_that_is_cancelled_before_its_turn_never_runs(engine: Engine) -> None:
    gate, ran = await Gate(engine).entered(), []
    job = asyncio.create_task(engine.run(lambda: ran.append("it")))
    await queued(engine, 1)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    gate.let_through()
    await engine.run(lambda: None)
    assert ran == []


async def test_cancelling_a_job_that_runs_waits_for_its_end(engine: Engine) -> None:
    gate = await Gate(engine).entered()
    gate.result.cancel()
    done, _ = await asyncio.wait([gate.result], timeout=0.05)
    assert not done
    gate.let_through()
    with pytest.raises(asyncio.CancelledError):
        await gate.result


async def test_cancelling_twice_still_waits_for_the_end(engine: Engine) -> None:
    gate = await Gate(engine).entered()
    for _ in range(2):
        gate.result.cancel()
        await asyncio.sleep(0)
    assert not gate.result.done()
    gate.let_through()
    with pytest.raises(asyncio.CancelledError):
        await gate.result


async def test_a_cancelled_jobs_own_error_is_dropped(engine: Engine) -> None:
    entered, let_through = threading.Event(), threading.Event()

    def fail() -> None:
        entered.set()
        let_through.wait()
        raise RuntimeError("nobody is interested any more")

    job = asyncio.create_task(engine.run(fail))
    await asyncio.to_thread(entered.wait)
    job.cancel()
    let_through.set()
    with pytest.raises(asyncio.CancelledError):
        await job


# what is kept


class Tensor:
    """Something whose life can be watched."""


@pytest.mark.parametrize("cancelled", [False, True])
async def test_nothing_of_a_job_is_kept_once_it_is_over(engine: Engine, cancelled: bool) -> None:
    tensor = Tensor()
    watched = weakref.ref(tensor)
    gate = await Gate(engine).entered()
    job = asyncio.create_task(engine.run(lambda tensor=tensor: tensor))
    await queued(engine, 1)
    if cancelled:
        job.cancel()
    gate.let_through()
    await asyncio.gather(job, return_exceptions=True)
    await gate.result
    await eventually(lambda: not engine.waiting, "the engine has finished")
    del tensor, job
    await eventually(lambda: gc.collect() >= 0 and watched() is None, "the tensor is freed")


# the end


async def test_close_ends_the_thread() -> None:
    before = threading.active_count()
    Engine("short").close()
    assert threading.active_count() == before


async def test_close_lets_the_running_job_finish(engine: Engine) -> None:
    gate = await Gate(engine).entered()
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    gate.let_through()
    assert (await gate.result).value == "through"
    await closing


async def test_close_refuses_the_jobs_that_wait(engine: Engine) -> None:
    gate = await Gate(engine).entered()
    job = asyncio.create_task(engine.run(lambda: None))
    await queued(engine, 1)
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    with pytest.raises(EngineClosedError):
        await job
    gate.let_through()
    await closing


async def test_a_closed_engine_takes_no_jobs(engine: Engine) -> None:
    engine.close()
    with pytest.raises(EngineClosedError, match="has stopped computing"):
        await engine.run(lambda: None)


async def test_close_may_be_called_twice(engine: Engine) -> None:
    engine.close()
    engine.close()
