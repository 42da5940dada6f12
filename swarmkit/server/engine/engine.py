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
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.models.execution.stage import Stage
from swarmkit.net.transport.shares import NOBODY, Holder
from swarmkit.server.engine.admission_policy import NOTHING_AHEAD, Ahead
from swarmkit.server.engine.delays import NO_STEPS, Pass
from swarmkit.server.engine.scheduler import (
    ExpectedArrivals,
    JobTurns,
    PassLimits,
    PassTimes,
    Schedule,
    WaitingStep,
    next_schedule,
    next_stage,
)
from swarmkit.server.engine.work import (
    INTERACTIVE,
    ClientAccounts,
    EngineClosedError,
    EnginePause,
    ExpiredError,
    Job,
    LearnedTimes,
    QueuedStep,
    StepTask,
    Timed,
    Work,
    WorkAhead,
    in_turn,
)
from swarmkit.server.engine.worker import ThreadWorker, Worker

T = TypeVar("T")


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
            clock, worker: the server's; what runs the engine's turns, which is a thread if not given.
        """
        self.limits = PassLimits(prefill_chunk_tokens, decode_slowdown)
        self.clock = clock
        self._worker = worker or ThreadWorker(f"swarmkit-engine-{name}", clock)
        self.now = self._worker.now
        """Seconds on the clock that goes on during a turn; in a simulation `clock` stands still then."""
        self._stages: WeakKeyDictionary[Stage, LearnedTimes] = WeakKeyDictionary()
        self._accounts = ClientAccounts()
        self._pause = EnginePause()
        self._job_turns = JobTurns()
        self._ahead = WorkAhead()
        # In order of arrival. Both threads add and remove single entries, which a dict lets them.
        self._works: dict[Work, None] = {}
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

    def ahead(self, rows: int, tokens: int, client: Holder = NOBODY) -> Ahead:
        """What a step of `rows` x `tokens` of a client would have to wait for if it came now."""
        if not self._works:
            return NOTHING_AHEAD
        return self._ahead.of(self._works, rows, tokens, client, self.limits.chunk_tokens, self.now())

    def set_pace(self, threads: int | None, compute_share: float) -> None:
        """From the next turn on, use so many threads (None: as at the start), and rest the other time."""
        self._threads = threads
        self._worker.compute_share = compute_share

    async def run(self, job: Callable[[], T], priority: int = INTERACTIVE) -> Timed[T]:
        """Run `job` in a turn of its own, and wait for it.

        Raises:
            EngineClosedError: the engine has been closed. Whatever the job raises is raised here too.
        """
        return await self._submit(Job(job, priority, self.now()))

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
        return await self._submit(QueuedStep(task, patience_s, self.learned_of(task.stage), self.now()))

    def learned_of(self, stage: Stage) -> LearnedTimes:
        """How long forward passes through a stage take, and which sessions decode on it, as far as known."""
        if (learned := self._stages.get(stage)) is None:
            with self._lock:
                learned = self._stages.setdefault(
                    stage, LearnedTimes(stage.device, self.now, stage.attention_cost)
                )
        return learned

    async def _submit(self, work: Work) -> Timed[Any]:
        with self._lock:
            if self._closed:
                raise EngineClosedError()
            self._works[work] = None
            self._pause.came(work)
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
            self._run_pass([(step, step.tokens, step.rows)])
            return 0.0
        if (paused_s := self._pause.left_s(self.now())) > 0:
            return paused_s
        before, (steps, jobs) = self._pause.works, self._take_stock()
        schedule = self._schedule(steps, jobs)
        if schedule is None:
            return None
        if schedule == Schedule():
            return self._pause.begin(steps, before, self.now())
        for step in steps:
            step.passed_over += 1
        self._job_turns.pass_over(job.bulk for job in jobs)
        if schedule.job is not None:
            self._run_job(jobs[schedule.job])
        else:
            pieces = [(steps[piece.key], piece.tokens, piece.rows) for piece in schedule.steps]
            self._run_pass(pieces, Counter([step.client for step in steps]))
        return 0.0

    def _use_threads(self) -> None:
        if self._usual_threads is None:
            self._usual_threads = torch.get_num_threads()
        torch.set_num_threads(self._threads or self._usual_threads)
        self._threads_in_use = self._threads

    def _lone_decode_step(self) -> QueuedStep | None:
        """The only work there is, if it is a decode step of the only session that decodes on its stage.

        Then there is nothing to schedule, and finding that out at length would be most of what the engine
        adds to the token's time.
        """
        works = list(self._works)
        work = works[0] if len(works) == 1 else None
        if not isinstance(work, QueuedStep) or not work.decode or work.cancelled:
            return None
        return work if work.learned.arrivals.has_no_other(work.session) else None

    def _take_stock(self) -> tuple[list[QueuedStep], list[Job]]:
        steps, jobs = [], []
        now = self.now()
        for work in list(self._works):
            if work.cancelled:
                # What has not begun is withdrawn by its caller.
                if isinstance(work, QueuedStep) and work.part is not None:
                    self._fail(work, asyncio.CancelledError())
            elif isinstance(work, QueuedStep):
                if work.part is None and now > work.expires_at:
                    if work.claim.acquire(blocking=False):
                        late = ExpiredError("its client's patience was over before its turn came")
                        self._resolve(work, None, late)
                else:
                    steps.append(work)
            elif isinstance(work, Job):
                jobs.append(work)
        return steps, jobs

    def _schedule(self, steps: list[QueuedStep], jobs: list[Job]) -> Schedule | None:
        now = self.now()
        served = self._accounts.shares.of_present([step.client for step in steps])
        for step in steps:
            if not step.decode:
                step.learned.arrivals.leave(step.session)
        by_stage: dict[LearnedTimes, list[WaitingStep]] = {}
        recent = self._accounts.recent.at(now)
        for key, step in in_turn(steps, self.limits, recent):
            waiting = step.as_waiting(key, served[step.client], now)
            by_stage.setdefault(step.learned, []).append(waiting)
        owed = self._accounts.owed(now)
        waiting_jobs = self._job_turns.waiting((job.bulk for job in jobs), now, owed)
        learned = next_stage(by_stage)
        here = {step.session for step in steps}
        if learned is None or not any(step.decode for step in by_stage[learned]):
            # Prefill and jobs delay the decode steps of all stages.
            with self._lock:
                stages = list(self._stages.values())
            expected = ExpectedArrivals.merged(one.arrivals.expected(now, here) for one in stages)
        elif len(by_stage) == 1:
            expected = learned.arrivals.expected(now, here)
        else:
            expected = ExpectedArrivals()  # nothing is gained by a pause while another stage has work
        if learned is None:
            return next_schedule((), waiting_jobs, expected, PassTimes(), self.limits, recent=recent)
        steps_of, times = by_stage[learned], learned.times
        served_now = self._accounts.just_served(owed, times, now)
        return next_schedule(
            steps_of, waiting_jobs, expected, times, self.limits, learned.cost, recent, owed, served_now
        )

    def _run_job(self, job: Job) -> None:
        if not job.claim.acquire(blocking=False):
            return
        started = self.now()
        try:
            value = job.run()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._resolve(job, None, error)
        else:
            self._resolve(job, Timed(value, started - job.queued_at, self.now() - started), None)
        self._job_turns.ran(job.bulk, started, self.now())
        self._accounts.ran_job(job.bulk, self.now())

    def _run_pass(
        self, scheduled: Sequence[tuple[QueuedStep, int, int]], waiting: Mapping[Holder, int] = NO_STEPS
    ) -> None:
        """One forward pass over some steps of one stage. `waiting`: how many steps each client has here."""
        began = self.now()
        group: list[tuple[QueuedStep, int, int]] = []
        for step, tokens, rows in scheduled:
            if step.part is None and not self._prepare(step):
                continue
            if step.tokens_left:
                whole = rows == step.rows_left or not step.cuts_rows
                group.append((step, min(tokens, step.tokens_left), step.rows_left if whole else rows))
            else:
                self._finish(step)
        if not group:
            return
        stage, learned = group[0][0].task.stage, group[0][0].learned
        try:
            learned.begin_pass()
            works = [step.work(tokens, rows) for step, tokens, rows in group]
            results = stage.forward_many([step.chunk(tokens, rows) for step, tokens, rows in group])
            learned.end_pass(max(1, int(sum(works))))
        except BaseException as error:  # noqa: BLE001 - it is raised where the steps were asked for
            for step, _, _ in group:
                self._fail(step, error)
            return
        for (step, _, _), result in zip(group, results, strict=True):
            step.passed_over = 0
            if isinstance(result, Exception):
                self._fail(step, result)
                continue
            step.add_output(result)
            if not step.tokens_left:
                self._finish(step)
        # What follows is noted when the results are on their way.
        learned.learn(decodes=all(step.decode for step, _, _ in group))
        took = Pass(began, self.now(), learned.latest_s, len(group), learned.times)
        self._accounts.ran([step for step, _, _ in group], works, took, waiting)

    def _prepare(self, step: QueuedStep) -> bool:
        """Whether the step may run: it was not withdrawn, and nothing is wrong with it."""
        if not step.claim.acquire(blocking=False):
            return False
        try:
            step.prepare(self.now())
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._resolve(step, None, error)
            return False
        return True

    def _finish(self, step: QueuedStep) -> None:
        try:
            output = step.outputs[0] if len(step.outputs) == 1 else torch.cat(step.outputs, dim=1)
            value = step.task.result(output)
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._fail(step, error)
            return
        now = self.now()
        self._resolve(step, Timed(value, step.started_at - step.queued_at, now - step.started_at), None)
        if step.decode:
            size, client = step.rows * step.tokens, step.client
            step.learned.arrivals.decoded(step.session, size, step.queued_at, now, client)
            self._accounts.recent.decoded(client, size, now)
        step.task.after_result(output)

    def _fail(self, step: QueuedStep, error: BaseException) -> None:
        step.rewind()
        self._resolve(step, None, error)

    def _resolve(self, work: Work, value: Timed[Any] | None, error: BaseException | None) -> None:
        self._works.pop(work, None)
        self._worker.deliver(work.loop, work.resolve, value, error)

    def _fail_all(self) -> None:
        """End the steps that had begun when the engine was closed."""
        for work in list(self._works):
            if isinstance(work, QueuedStep) and work.part is not None:
                self._fail(work, EngineClosedError())
