"""One thread per device: work goes in, results come out, nothing else touches the device.

Work is of two kinds. A *step* of a session is run together with others' steps, and a long one in pieces;
`scheduler` decides what each forward pass is made of. A *job* is any function, and runs by itself.

A device may hold several stages: of two models, or of one model's blocks while a server moves to others. A
forward pass goes through one of them, so each stage has its own measured times, and they take turns.

::

    submit ──> waiting ──(begin: decode, check)──> running ──(a turn per chunk)──> settled
                  └── withdrawn by its caller         └── given up between two chunks
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import anyio
import torch
from torch import Tensor

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import SwarmkitError, UsageError
from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.server.engine.admission_policy import NOTHING_AHEAD, Ahead, expected_wait_s
from swarmkit.server.engine.device_watch import DeviceWatch, marks_of
from swarmkit.server.engine.scheduler import (
    DECODE_TOKENS,
    ArrivalPredictor,
    ExpectedArrivals,
    FairShares,
    PassLimits,
    PassTimes,
    Schedule,
    WaitingJob,
    WaitingStep,
    next_schedule,
    next_stage,
)
from swarmkit.server.engine.worker import ThreadWorker, Worker

logger = logging.getLogger(__name__)


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

INTERACTIVE = 0
"""Priority of a job that somebody is waiting for."""
BULK = 1
"""Priority of everything else."""

_PAUSE_S = 0.001
"""Until the scheduler is asked again, when it had nothing to run just then."""


class EngineClosedError(UsageError):
    """The engine ended before the job's turn came."""


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A result, and the seconds it waited and ran."""

    value: T
    queue_s: float
    compute_s: float


class ExpiredError(SwarmkitError):
    """Nobody waits for the step any more: it had not begun when its time was over."""


class StepTask(Protocol[T_co]):
    """One step of a session, as the engine needs it."""

    @property
    def stage(self) -> Stage:
        """What it runs on."""

    @property
    def client(self) -> str:
        """For whom it is; clients are served alike, however many sessions they have."""

    @property
    def session(self) -> Hashable:
        """What tells its session from others."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens."""

    @property
    def known(self) -> Tensor | None:
        """After `begin`: outputs [rows, so many, hidden] of first tokens that the cache holds already."""

    def begin(self) -> StepPart:
        """On the engine's thread, before its first turn: all of the step. What it raises ends the step."""

    def finish(self, output: Tensor) -> T_co:
        """On the engine's thread, after its last turn; `output` is [rows, tokens, hidden]."""

    def afterwards(self, output: Tensor) -> None:
        """On the engine's thread, when the result of `finish` is on its way. Must not raise."""


class _Work:
    """Something on its way from the event loop to the engine's thread and back.

    `claim` is taken once, by the engine to begin or by its caller to withdraw it. `ended`, `done` and `after`
    belong to the event loop's thread.
    """

    def __init__(self, worker: Worker) -> None:
        self.claim = threading.Lock()
        self.worker = worker
        self.given_up = False
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Timed[Any]] = self.loop.create_future()
        self.ended = False
        self.after: asyncio.Future[None] | None = None
        self.queued_at = worker.now()

    def settle(self, value: Timed[Any] | None, error: BaseException | None) -> None:
        """From any thread: hand the outcome to whoever waits."""
        self.worker.deliver(self.loop, self._settle, value, error)

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
        """Wait for the end of what runs, whatever happens to the one who waits."""
        with anyio.CancelScope(shield=True):
            while not self.ended:
                if self.after is None or self.after.done():
                    self.after = self.loop.create_future()
                with contextlib.suppress(asyncio.CancelledError):
                    await self.after


class _StageTimes:
    """What the engine has learnt about one stage: times of its passes, and when its sessions are back."""

    def __init__(self, device: torch.device, now: Callable[[], float]) -> None:
        self.passes = PassTimes()
        self.watch: DeviceWatch[int] = DeviceWatch(marks_of(device, now), self.passes.learn)
        self.decoders = ArrivalPredictor()


class _Job(_Work):
    def __init__(self, worker: Worker, run: Callable[[], Any], priority: int) -> None:
        super().__init__(worker)
        self.run = run
        self.bulk = priority == BULK


class _QueuedStep(_Work):
    """A step and how far it has come. All but what a `_Work` has belongs to the engine's thread."""

    def __init__(self, worker: Worker, task: StepTask[Any], patience_s: float) -> None:
        super().__init__(worker)
        self.task = task
        self.expires_at = self.queued_at + patience_s if patience_s else math.inf
        self.rows, self.tokens = task.shape
        self.decode = self.tokens <= DECODE_TOKENS
        self.passed_over = 0
        self.tokens_done = 0
        self.whole: StepPart | None = None
        self.past = 0
        self.outputs: list[Tensor] = []
        self.started_at = 0.0

    def begin(self) -> None:
        self.started_at = self.worker.now()
        self.whole = self.task.begin()
        self.past = self.whole.cache.tokens
        if (known := self.task.known) is not None:
            self.past -= known.shape[1]
            self.advance(known)

    def chunk(self, tokens: int) -> StepPart:
        """The next so many tokens of it."""
        whole = self.whole
        assert whole is not None
        start, stop = self.tokens_done, self.tokens_done + tokens
        if (start, stop) == (0, self.tokens):
            return whole
        mask, positions = whole.attention_mask, whole.position_ids
        return StepPart(
            whole.hidden[:, start:stop],
            whole.cache,
            None if mask is None else mask[:, : self.past + stop],
            None if positions is None else positions[:, start:stop],
        )

    @property
    def tokens_left(self) -> int:
        return self.tokens - self.tokens_done

    def advance(self, output: Tensor) -> None:
        """Take the output of a chunk."""
        self.outputs.append(output)
        self.tokens_done += output.shape[1]

    def output(self) -> Tensor:
        """Of all chunks."""
        return self.outputs[0] if len(self.outputs) == 1 else torch.cat(self.outputs, dim=1)

    def finish(self, output: Tensor) -> Timed[Any]:
        value = self.task.finish(output)
        return Timed(value, self.started_at - self.queued_at, self.worker.now() - self.started_at)

    def undo(self) -> None:
        """A step is done as a whole or not at all."""
        if self.whole is not None:
            self.whole.cache.rewind(self.past)


class Engine:
    """A thread that runs steps and jobs.

    What is cancelled before its turn is skipped. A job that runs is finished, and its result dropped; of a
    step the present chunk is. The caller is held until then, so that whatever it lent is in use for no longer
    than its call takes.
    """

    def __init__(
        self,
        name: str = "cpu",
        *,
        prefill_chunk_tokens: int = 512,
        decode_slowdown: float = 1.6,
        clock: Clock = SYSTEM_CLOCK,
        worker: Worker | None = None,
    ) -> None:
        """Make an engine, which runs until `close`.

        Args:
            prefill_chunk_tokens: see the scheduler's `PassLimits`; `decode_slowdown` too.
            clock: the server's.
            worker: what runs the engine's turns; a thread if not given.
        """
        self._limits = PassLimits(prefill_chunk_tokens, decode_slowdown)
        self._stages: weakref.WeakKeyDictionary[Stage, _StageTimes] = weakref.WeakKeyDictionary()
        """Learnt times belong to a stage, and are forgotten with it."""
        self._fair = FairShares()
        self._passed_over = {False: 0, True: 0}  # turns that interactive and bulk jobs have waited for
        # In order of arrival. Both threads add and remove single entries, which a dict lets them.
        self._works: dict[_Work, None] = {}
        self._threads: int | None = None
        self._threads_in_use: int | None = None
        self._usual_threads: int | None = None
        self._closed = False
        self._lock = threading.Lock()  # nothing may slip in behind the end
        self.clock = clock
        self._worker = worker or ThreadWorker(f"swarmkit-engine-{name}", clock)
        self._now = self._worker.now
        self._worker.start(self._run_turn, self._end)

    @property
    def waiting(self) -> int:
        """Steps and jobs that have not begun."""
        return sum(not work.claim.locked() for work in list(self._works))

    @property
    def holds(self) -> int:
        """Steps and jobs that have not ended."""
        return len(self._works)

    def ahead(self, rows: int, tokens: int) -> Ahead:
        """What a step of such a shape would find if it came now."""
        if not self._works:
            return NOTHING_AHEAD
        works = list(self._works)
        left: dict[Stage, list[int]] = {}
        for work in works:
            if isinstance(work, _QueuedStep):
                left.setdefault(work.task.stage, []).append(work.rows * work.tokens_left)
        decode, chunk = tokens <= DECODE_TOKENS, self._limits.chunk_tokens
        wait_s = sum(
            expected_wait_s(rows * tokens, decode, sizes, times.passes, chunk)
            for stage, sizes in left.items()
            if (times := self._stages.get(stage)) is not None
        )
        return Ahead(len(works), wait_s)

    def times_of(self, stage: Stage) -> PassTimes:
        """How long forward passes through a stage take, as far as measured."""
        return self._times_of(stage).passes

    def set_threads(self, threads: int | None) -> None:
        """Compute on so many processor threads from the next pass on; None: as many as at the start."""
        self._threads = threads

    async def run(self, job: Callable[[], T], priority: int = INTERACTIVE) -> Timed[T]:
        """Run `job` on the engine's thread, by itself, and wait for it.

        Raises:
            EngineClosedError: the engine has been closed. Whatever the job raises is raised here too.
        """
        return await self._submit(_Job(self._worker, job, priority))

    async def step(self, task: StepTask[T], patience_s: float = 0.0) -> Timed[T]:
        """Run a step, perhaps together with others', and wait for it.

        Args: patience_s: where it waits for others for longer than that, it is dropped; 0 = however long.

        Its session has no other step meanwhile. Whether it fails or is cancelled, the session's cache holds
        afterwards what it held after `task.begin()`.

        Raises:
            EngineClosedError: the engine has been closed. Whatever the step raises is raised here too.
            ExpiredError: its time was over before its turn came.
        """
        return await self._submit(_QueuedStep(self._worker, task, patience_s))

    async def _submit(self, work: _Work) -> Timed[Any]:
        with self._lock:
            if self._closed:
                raise _closed()
            self._works[work] = None
            self._worker.ring()
        try:
            return await work.done
        except asyncio.CancelledError:
            work.given_up = True
            if work.claim.acquire(blocking=False):
                self._works.pop(work, None)
            else:
                await work.wait_until_ended()
            raise

    def close(self) -> None:
        """Finish the job or chunk that runs, refuse what waits, end the thread. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for work in list(self._works):
                    if work.claim.acquire(blocking=False):
                        self._settle(work, None, _closed())
                self._worker.stop()
        self._worker.join()

    # ------------------------------------------------------------------ on the engine's thread

    def _end(self) -> None:
        for work in list(self._works):
            if isinstance(work, _QueuedStep) and work.whole is not None:
                self._fail(work, _closed())

    def _run_turn(self) -> float | None:
        """Schedule, run, settle. Returns how long to wait for something new; None: until it comes.

        A function of its own, so that nothing of a step (tensors, mostly) is held while waiting for the next.
        """
        if not self._works:
            return None
        if self._threads != self._threads_in_use:
            self._use_threads()
        if (alone := self._lone_decode_step()) is not None:
            self._run_forward([(alone, alone.tokens)])
            return 0.0
        steps, jobs = self._take_stock()
        turn = self._schedule(steps, jobs)
        if turn is None:
            return None
        if turn == Schedule():
            return _PAUSE_S
        for step in steps:
            step.passed_over += 1
        for bulk in {job.bulk for job in jobs}:
            self._passed_over[bulk] += 1
        if turn.job is not None:
            self._run_job(jobs[turn.job])
        else:
            self._run_forward([(steps[share.key], share.tokens) for share in turn.shares])
        return 0.0

    def _use_threads(self) -> None:
        if self._usual_threads is None:
            self._usual_threads = torch.get_num_threads()
        torch.set_num_threads(self._threads or self._usual_threads)
        self._threads_in_use = self._threads

    def _lone_decode_step(self) -> _QueuedStep | None:
        """The only work there is, if it is a token for the only one who decodes: then there is nothing to
        schedule, and finding that out at length would be most of what the engine adds to the token's time.
        """
        works = list(self._works)
        work = works[0] if len(works) == 1 else None
        if not isinstance(work, _QueuedStep) or not work.decode or work.given_up:
            return None
        times = self._times_of(work.task.stage)
        return work if times.decoders.nobody_but(work.task.session) else None

    def _take_stock(self) -> tuple[list[_QueuedStep], list[_Job]]:
        steps, jobs = [], []
        now = self._now()
        for work in list(self._works):
            if work.given_up:
                # What has not begun is withdrawn by its caller.
                if isinstance(work, _QueuedStep) and work.whole is not None:
                    self._fail(work, asyncio.CancelledError())
            elif isinstance(work, _QueuedStep):
                if work.whole is None and now > work.expires_at:
                    self._expire(work)
                else:
                    steps.append(work)
            elif isinstance(work, _Job):
                jobs.append(work)
        return steps, jobs

    def _schedule(self, steps: list[_QueuedStep], jobs: list[_Job]) -> Schedule | None:
        now = self._now()
        served = self._fair.of_present(step.task.client for step in steps)
        by_stage: dict[Stage, list[WaitingStep]] = {}
        for key, step in enumerate(steps):
            if not step.decode:
                self._times_of(step.task.stage).decoders.leave(step.task.session)
            waiting = WaitingStep(
                key,
                served[step.task.client],
                step.rows,
                step.tokens_left,
                step.decode,
                now - step.queued_at,
                step.passed_over,
            )
            by_stage.setdefault(step.task.stage, []).append(waiting)
        stage = next_stage(by_stage)
        if stage is None:
            expected, passes, here = ExpectedArrivals(), PassTimes(), []
        else:
            times, here = self._times_of(stage), by_stage[stage]
            expected = times.decoders.expected(now, {step.task.session for step in steps})
            passes = times.passes
        waiting_jobs = [
            WaitingJob(key, job.bulk, self._passed_over[job.bulk]) for key, job in enumerate(jobs)
        ]
        return next_schedule(here, waiting_jobs, expected, passes, self._limits)

    def _run_job(self, job: _Job) -> None:
        self._passed_over[job.bulk] = 0
        if not job.claim.acquire(blocking=False):
            return
        started = self._now()
        try:
            value = job.run()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._settle(job, None, error)
        else:
            ended = self._now()
            self._settle(job, Timed(value, started - job.queued_at, ended - started), None)

    def _run_forward(self, shares: Sequence[tuple[_QueuedStep, int]]) -> None:
        """Run one forward pass over the next tokens of some steps, which are all of one stage."""
        group: list[tuple[_QueuedStep, int]] = []
        for step, tokens in shares:
            if step.whole is None and not self._begin(step):
                continue
            if not step.tokens_left:
                self._finish(step)
                continue
            group.append((step, min(tokens, step.tokens_left)))
        if not group:
            return
        stage = group[0][0].task.stage
        watch = self._times_of(stage).watch
        try:
            begun = watch.begin()
            results = stage.forward_many([step.chunk(tokens) for step, tokens in group])
            watch.end(begun, sum(step.rows * tokens for step, tokens in group))
        except BaseException as error:  # noqa: BLE001 - it is raised where the steps were asked for
            for step, _ in group:
                self._fail(step, error)
            return
        for (step, _), result in zip(group, results, strict=True):
            step.passed_over = 0
            self._advance(step, result)
        # The outputs are on their way already: what follows delays no step.
        watch.catch_up()
        for step, tokens in group:
            self._fair.serve(step.task.client, step.rows * tokens)

    def _times_of(self, stage: Stage) -> _StageTimes:
        times = self._stages.get(stage)
        if times is None:
            times = self._stages[stage] = _StageTimes(stage.device, self._now)
        return times

    def _begin(self, step: _QueuedStep) -> bool:
        """Whether the step may run: it was not withdrawn, and nothing is wrong with it."""
        if not step.claim.acquire(blocking=False):
            return False
        try:
            step.begin()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._settle(step, None, error)
            return False
        return True

    def _expire(self, step: _QueuedStep) -> None:
        """Drop what nobody waits for any more."""
        if step.claim.acquire(blocking=False):
            self._settle(step, None, ExpiredError("its client's patience was over before its turn came"))

    def _advance(self, step: _QueuedStep, result: Tensor | Exception) -> None:
        if isinstance(result, Exception):
            self._fail(step, result)
            return
        step.advance(result)
        if not step.tokens_left:
            self._finish(step)

    def _finish(self, step: _QueuedStep) -> None:
        try:
            output = step.output()
            timed = step.finish(output)
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._fail(step, error)
            return
        now = self._now()
        self._settle(step, timed, None)
        if step.decode:
            tokens = step.rows * step.tokens
            decoders = self._times_of(step.task.stage).decoders
            decoders.decoded(step.task.session, tokens, step.queued_at, now)
        step.task.afterwards(output)

    def _fail(self, step: _QueuedStep, error: BaseException) -> None:
        step.undo()
        self._settle(step, None, error)

    def _settle(self, work: _Work, value: Timed[Any] | None, error: BaseException | None) -> None:
        self._works.pop(work, None)
        work.settle(value, error)


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine is closed; make a new server to go on serving")
