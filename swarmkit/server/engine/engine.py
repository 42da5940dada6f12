"""The engine of a device: work goes in, results come out, and nothing else touches the device.

Work is of two kinds. A *step* of a session runs together with steps of other sessions, and a long step runs
in chunks; `scheduler` decides what each forward pass is made of. A *job* is any function, and runs by itself.

::

    submit ──> waiting ──(prepare: decode, check)──> running ──(a turn per chunk)──> resolved
                  └── withdrawn by its caller           └── cancelled between two chunks

The engine works in *turns*: one job, or one forward pass of one stage. A `Worker` runs them, one after the
other.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import anyio
import torch
from torch import Tensor

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import SwarmkitError
from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.net.rpc.faults import Refusal
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
"""Priority of a job that a user is waiting for."""
BULK = 1
"""Priority of every other job."""

_PAUSE_S = 0.001
"""Seconds until the scheduler is asked again, when it had nothing to run just then."""


class EngineClosedError(Refusal):
    """The engine was closed before the work's turn came. A client is told that the server leaves."""

    def __init__(self) -> None:
        super().__init__("leaving", "this server has stopped computing; use another one")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A result, and the seconds that its work waited and ran."""

    value: T
    queue_s: float
    compute_s: float


class ExpiredError(SwarmkitError):
    """The step had not begun when its client's patience ended, and was dropped."""


class StepTask(Protocol[T_co]):
    """One step of a session, as the engine needs it."""

    @property
    def stage(self) -> Stage:
        """The stage that the step runs on."""

    @property
    def client(self) -> str:
        """The client's peer id; clients are served alike, however many sessions they have."""

    @property
    def session(self) -> Hashable:
        """A key that tells the step's session from others."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens per row."""

    @property
    def cached_output(self) -> Tensor | None:
        """After `prepare`: outputs [rows, cached tokens, hidden] of first tokens that the cache holds
        already.
        """

    def prepare(self) -> StepPart:
        """Return all of the step. Called in a turn, before the first chunk; an exception ends the step."""

    def result(self, output: Tensor) -> T_co:
        """Turn `output` [rows, tokens, hidden] into the step's result. Called in a turn, after the last
        chunk.
        """

    def after_result(self, output: Tensor) -> None:
        """Do what may wait until the result is on its way. Called in a turn; must not raise."""


class _Work:
    """A step or job on its way from the event loop to the engine and back.

    `claim` is taken once: by the engine to begin the work, or by its caller to withdraw it. `ended`, `done`
    and `after` belong to the event loop's thread.
    """

    def __init__(self, now: float) -> None:
        self.claim = threading.Lock()
        self.cancelled = False
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Timed[Any]] = self.loop.create_future()
        self.ended = False
        self.after: asyncio.Future[None] | None = None
        self.queued_at = now

    def resolve(self, value: Timed[Any] | None, error: BaseException | None) -> None:
        """Give the caller the outcome. Called on the event loop."""
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
        """Wait for the end of work that has begun, even if the waiting task is cancelled meanwhile."""
        with anyio.CancelScope(shield=True):
            while not self.ended:
                if self.after is None or self.after.done():
                    self.after = self.loop.create_future()
                try:
                    await self.after
                except asyncio.CancelledError:
                    continue


class _Job(_Work):
    def __init__(self, run: Callable[[], Any], priority: int, now: float) -> None:
        super().__init__(now)
        self.run = run
        self.bulk = priority == BULK


class _Learned:
    """What the engine has learned of one stage: how long its passes take, and when its sessions are back."""

    def __init__(self, stage: Stage, clock: Callable[[], float]) -> None:
        self.times = PassTimes()
        self.arrivals = ArrivalPredictor()
        self.watch: DeviceWatch[int] = DeviceWatch(marks_of(stage.device, clock), self.times.learn)


class _QueuedStep(_Work):
    """A step and its progress. All but what a `_Work` has belongs to the engine's turns."""

    def __init__(self, task: StepTask[Any], patience_s: float, learned: _Learned, now: float) -> None:
        super().__init__(now)
        self.task = task
        self.learned = learned
        self.expires_at = now + patience_s if patience_s else math.inf
        self.rows, self.tokens = task.shape
        self.decode = self.tokens <= DECODE_TOKENS
        self.passed_over = 0
        self.tokens_done = 0
        self.part: StepPart | None = None
        """All of the step, once it was prepared."""
        self.past = 0
        """Tokens that its cache held before the step."""
        self.outputs: list[Tensor] = []
        self.started_at = 0.0

    @property
    def tokens_left(self) -> int:
        return self.tokens - self.tokens_done

    def prepare(self, now: float) -> None:
        self.started_at = now
        self.part = self.task.prepare()
        self.past = self.part.cache.tokens
        if (cached := self.task.cached_output) is not None:
            self.past -= cached.shape[1]
            self.add_output(cached)

    def chunk(self, tokens: int) -> StepPart:
        """The step's next `tokens` tokens per row."""
        part = self.part
        assert part is not None
        if tokens == self.tokens:
            return part
        start, stop = self.tokens_done, self.tokens_done + tokens
        mask, positions = part.attention_mask, part.position_ids
        return StepPart(
            part.hidden[:, start:stop],
            part.cache,
            None if mask is None else mask[:, : self.past + stop],
            None if positions is None else positions[:, start:stop],
        )

    def add_output(self, output: Tensor) -> None:
        self.outputs.append(output)
        self.tokens_done += output.shape[1]

    def rewind(self) -> None:
        """Leave the cache as it was before the step, which is done as a whole or not at all."""
        if self.part is not None:
            self.part.cache.rewind(self.past)


class Engine:
    """Runs steps of any number of stages, and jobs, on one device.

    Work that is cancelled before its turn is skipped. A job that runs is finished, and its result dropped; of
    a running step the present chunk is. The caller is held until then, so that what it lent is in use for no
    longer than its call takes.

    What is learned of a stage (how long its passes take, which sessions decode on it) lasts as long as the
    stage.

    Attributes:
        limits: how far prefill may go. May be replaced at any time; the next turn goes by it.
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
            prefill_chunk_tokens, decode_slowdown: see the scheduler's `PassLimits`.
            clock: the server's.
            worker: what runs the engine's turns; a thread if not given.
        """
        self.limits = PassLimits(prefill_chunk_tokens, decode_slowdown)
        self.clock = clock
        self._worker = worker or ThreadWorker(f"swarmkit-engine-{name}", clock)
        self.now = self._worker.now
        """Seconds on the clock that goes on during a turn; in a simulation `clock` stands still then."""
        self._stages: WeakKeyDictionary[Stage, _Learned] = WeakKeyDictionary()
        self._fair = FairShares()
        self._passed_over = {False: 0, True: 0}  # turns that interactive and bulk jobs have waited for
        # In order of arrival. Both threads add and remove single entries, which a dict lets them.
        self._works: dict[_Work, None] = {}
        self._closed = False
        self._lock = threading.Lock()  # no work may slip in behind `close`
        self._threads: int | None = None
        self._threads_in_use: int | None = None
        self._usual_threads: int | None = None
        self._worker.start(self._run_turn, self._fail_all)

    @property
    def waiting(self) -> int:
        """Number of steps and jobs that have not begun."""
        return sum(not work.claim.locked() for work in list(self._works))

    @property
    def holds(self) -> int:
        """Number of steps and jobs that have not ended."""
        return len(self._works)

    @property
    def is_withdrawn(self) -> bool:
        """Whether the callers of all steps and jobs that have not ended have given them up."""
        return all(work.cancelled for work in list(self._works))

    def ahead(self, rows: int, tokens: int) -> Ahead:
        """What a step of `rows` x `tokens` would have to wait for if it came now."""
        if not self._works:
            return NOTHING_AHEAD
        works = list(self._works)
        left: dict[_Learned, list[int]] = {}
        for work in works:
            if isinstance(work, _QueuedStep):
                left.setdefault(work.learned, []).append(work.rows * work.tokens_left)
        decode = tokens <= DECODE_TOKENS
        wait_s = sum(
            expected_wait_s(rows * tokens, decode, of_stage, learned.times, self.limits.chunk_tokens)
            for learned, of_stage in left.items()
        )
        return Ahead(len(works), wait_s)

    def set_threads(self, threads: int | None) -> None:
        """Compute on `threads` processor threads from the next turn on; None: on as many as at the start."""
        self._threads = threads

    async def run(self, job: Callable[[], T], priority: int = INTERACTIVE) -> Timed[T]:
        """Run `job` in a turn of its own, and wait for it.

        Raises:
            EngineClosedError: the engine has been closed. Whatever the job raises is raised here too.
        """
        return await self._submit(_Job(job, priority, self.now()))

    async def step(self, task: StepTask[T], patience_s: float = 0.0) -> Timed[T]:
        """Run a step, perhaps together with others, and wait for it.

        Its session has no other step meanwhile. If it fails or is cancelled, the session's cache holds
        afterwards what it held after `task.prepare()`.

        Args:
            patience_s: a step that has waited for longer than this is dropped; 0 is no limit.

        Raises:
            EngineClosedError: the engine has been closed. Whatever the step raises is raised here too.
            ExpiredError: its patience was over before its turn came.
        """
        return await self._submit(_QueuedStep(task, patience_s, self._learned_of(task.stage), self.now()))

    def times_of(self, stage: Stage) -> PassTimes:
        """How long forward passes through a stage take, as far as measured."""
        return self._learned_of(stage).times

    def _learned_of(self, stage: Stage) -> _Learned:
        if (learned := self._stages.get(stage)) is None:
            with self._lock:
                learned = self._stages.setdefault(stage, _Learned(stage, self.now))
        return learned

    async def _submit(self, work: _Work) -> Timed[Any]:
        with self._lock:
            if self._closed:
                raise EngineClosedError()
            self._works[work] = None
            self._worker.ring()
        try:
            return await work.done
        except asyncio.CancelledError:
            work.cancelled = True
            if work.claim.acquire(blocking=False):
                self._works.pop(work, None)
            else:
                await work.wait_until_ended()
            raise

    @property
    def closed(self) -> bool:
        """Whether the engine takes no more work."""
        return self._closed

    def close(self) -> None:
        """Finish the job or chunk that runs, refuse what waits, end the worker. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for work in list(self._works):
                    if work.claim.acquire(blocking=False):
                        self._resolve(work, None, EngineClosedError())
                self._worker.stop()
        self._worker.join()

    # ------------------------------------------------------------------ in turns, on the worker

    def _run_turn(self) -> float | None:
        """Schedule, run, resolve. Returns the seconds until the next turn; None: there is nothing to do.

        A function of its own, so that nothing of a step (tensors, mostly) is held between two turns.
        """
        if not self._works:
            return None
        if self._threads != self._threads_in_use:
            self._use_threads()
        if (step := self._lone_decode_step()) is not None:
            self._run_pass([(step, step.tokens)])
            return 0.0
        steps, jobs = self._take_stock()
        schedule = self._schedule(steps, jobs)
        if schedule is None:
            return None
        if schedule == Schedule():
            return _PAUSE_S
        for step in steps:
            step.passed_over += 1
        for bulk in {job.bulk for job in jobs}:
            self._passed_over[bulk] += 1
        if schedule.job is not None:
            self._run_job(jobs[schedule.job])
        else:
            self._run_pass([(steps[scheduled.key], scheduled.tokens) for scheduled in schedule.steps])
        return 0.0

    def _use_threads(self) -> None:
        if self._usual_threads is None:
            self._usual_threads = torch.get_num_threads()
        torch.set_num_threads(self._threads or self._usual_threads)
        self._threads_in_use = self._threads

    def _lone_decode_step(self) -> _QueuedStep | None:
        """The only work there is, if it is a decode step of the only session that decodes on its stage.

        Then there is nothing to schedule, and finding that out at length would be most of what the engine
        adds to the token's time.
        """
        works = list(self._works)
        work = works[0] if len(works) == 1 else None
        if not isinstance(work, _QueuedStep) or not work.decode or work.cancelled:
            return None
        return work if work.learned.arrivals.has_no_other(work.task.session) else None

    def _take_stock(self) -> tuple[list[_QueuedStep], list[_Job]]:
        steps, jobs = [], []
        now = self.now()
        for work in list(self._works):
            if work.cancelled:
                # What has not begun is withdrawn by its caller.
                if isinstance(work, _QueuedStep) and work.part is not None:
                    self._fail(work, asyncio.CancelledError())
            elif isinstance(work, _QueuedStep):
                if work.part is None and now > work.expires_at:
                    if work.claim.acquire(blocking=False):
                        late = ExpiredError("its client's patience was over before its turn came")
                        self._resolve(work, None, late)
                else:
                    steps.append(work)
            elif isinstance(work, _Job):
                jobs.append(work)
        return steps, jobs

    def _schedule(self, steps: list[_QueuedStep], jobs: list[_Job]) -> Schedule | None:
        now = self.now()
        served = self._fair.of_present(step.task.client for step in steps)
        for step in steps:
            if not step.decode:
                step.learned.arrivals.leave(step.task.session)
        by_stage: dict[_Learned, list[WaitingStep]] = {}
        for key, step in enumerate(steps):
            waiting = WaitingStep(
                key,
                served[step.task.client],
                step.rows,
                step.tokens_left,
                step.decode,
                now - step.queued_at,
                step.passed_over,
            )
            by_stage.setdefault(step.learned, []).append(waiting)
        waiting_jobs = [
            WaitingJob(key, job.bulk, self._passed_over[job.bulk]) for key, job in enumerate(jobs)
        ]
        learned = next_stage(by_stage)
        if learned is None:
            return next_schedule((), waiting_jobs, ExpectedArrivals(), PassTimes(), self.limits)
        here = {step.task.session for step in steps}
        if not any(step.decode for step in by_stage[learned]):
            # Prefill delays the decode steps of all stages.
            with self._lock:
                stages = list(self._stages.values())
            expected = ExpectedArrivals.merged(one.arrivals.expected(now, here) for one in stages)
        elif len(by_stage) == 1:
            expected = learned.arrivals.expected(now, here)
        else:
            expected = ExpectedArrivals()  # nothing is gained by a pause while another stage has work
        return next_schedule(by_stage[learned], waiting_jobs, expected, learned.times, self.limits)

    def _run_job(self, job: _Job) -> None:
        self._passed_over[job.bulk] = 0
        if not job.claim.acquire(blocking=False):
            return
        started = self.now()
        try:
            value = job.run()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._resolve(job, None, error)
        else:
            self._resolve(job, Timed(value, started - job.queued_at, self.now() - started), None)

    def _run_pass(self, scheduled: Sequence[tuple[_QueuedStep, int]]) -> None:
        """One forward pass over the next tokens of some steps of one stage."""
        group: list[tuple[_QueuedStep, int]] = []
        for step, tokens in scheduled:
            if step.part is None and not self._prepare(step):
                continue
            if step.tokens_left:
                group.append((step, min(tokens, step.tokens_left)))
            else:
                self._finish(step)
        if not group:
            return
        stage, watch = group[0][0].task.stage, group[0][0].learned.watch
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
            if isinstance(result, Exception):
                self._fail(step, result)
                continue
            step.add_output(result)
            if not step.tokens_left:
                self._finish(step)
        # What follows is noted when the results are on their way.
        watch.catch_up()
        for step, tokens in group:
            self._fair.serve(step.task.client, step.rows * tokens)

    def _prepare(self, step: _QueuedStep) -> bool:
        """Whether the step may run: it was not withdrawn, and nothing is wrong with it."""
        if not step.claim.acquire(blocking=False):
            return False
        try:
            step.prepare(self.now())
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._resolve(step, None, error)
            return False
        return True

    def _finish(self, step: _QueuedStep) -> None:
        try:
            outputs = step.outputs
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
            value = step.task.result(output)
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._fail(step, error)
            return
        now = self.now()
        self._resolve(step, Timed(value, step.started_at - step.queued_at, now - step.started_at), None)
        if step.decode:
            step.learned.arrivals.decoded(step.task.session, step.rows * step.tokens, step.queued_at, now)
        step.task.after_result(output)

    def _fail(self, step: _QueuedStep, error: BaseException) -> None:
        step.rewind()
        self._resolve(step, None, error)

    def _resolve(self, work: _Work, value: Timed[Any] | None, error: BaseException | None) -> None:
        self._works.pop(work, None)
        self._worker.deliver(work.loop, work.resolve, value, error)

    def _fail_all(self) -> None:
        """End the steps that had begun when the engine was closed."""
        for work in list(self._works):
            if isinstance(work, _QueuedStep) and work.part is not None:
                self._fail(work, EngineClosedError())
