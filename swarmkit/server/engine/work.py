"""What an engine runs: steps of sessions and jobs, with the progress and the outcome of each."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import anyio
import torch
from torch import Tensor

from swarmkit.errors import SwarmkitError
from swarmkit.models.execution.attention_cost import AttentionCost
from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.transport.shares import NOBODY, Holder
from swarmkit.server.engine.admission_policy import Ahead, expected_wait_s
from swarmkit.server.engine.delays import NOTHING_OWED, OTHERS_WAIT_PASSES, Delays, Owed, Pass
from swarmkit.server.engine.device_watch import DeviceWatch
from swarmkit.server.engine.scheduler import (
    DECODE_TOKENS,
    MOST_DECODE_TOKENS,
    NO_ATTENTION,
    NO_CLIENTS,
    ArrivalPredictor,
    HostShares,
    PassLimits,
    PassTimes,
    RecentClients,
    ServedBefore,
    WaitingStep,
    is_decode,
    most_beside,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_CROWD = 32
"""So many steps and jobs are not counted anew for each that comes."""
_COUNTED_FOR_S, _COUNTED_FOR_S_EACH = 0.02, 0.0001
"""Seconds for which they are not; and for each of very many of them, lest most time be spent on that."""
_CHANGED_BY = 1 / 8
"""For a prompt they are, if so much of their number has come or gone."""
_MOST_CONSIDERED = 64
"""Decode steps of one client beside others; fewer where a pass cannot have so many."""

_MOST_MET = 16
"""Tokens of another client's decode steps that a decode step is taken to wait for."""

INTERACTIVE = 0
"""Priority of a job that a user is waiting for."""
BULK = 1
"""Priority of every other job."""


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
    def client(self) -> Holder:
        """The client and its host; both are served alike, however many sessions or clients they have."""

    @property
    def session(self) -> Hashable:
        """A key that tells the step's session from others."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens per row."""

    @property
    def past(self) -> int:
        """Tokens per row that the session's cache holds before the step."""

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


class Work:
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


class Job(Work):
    """A function that runs in a turn of its own."""

    def __init__(self, run: Callable[[], Any], priority: int, now: float) -> None:
        super().__init__(now)
        self.run = run
        self.bulk = priority == BULK


class LearnedTimes:
    """What the engine has learned of one stage: how long its passes take, and when its sessions are back.

    On a CPU a pass is done when its call returns. An accelerator is watched, and not waited for.

    Attributes:
        decode_s: seconds that passes over nothing but single tokens took; on an accelerator, to give it them.
    """

    def __init__(
        self, device: torch.device, now: Callable[[], float], cost: AttentionCost = NO_ATTENTION
    ) -> None:
        self.times = PassTimes()
        self.arrivals = ArrivalPredictor()
        self.cost = cost
        self.decode_s = 0.0
        self._now = now
        self._begun_at = 0.0
        self._latest = 0, 0.0
        self._mark: Any = None
        self._watch: DeviceWatch[int] | None = None
        if device.type != "cpu":
            self._watch = DeviceWatch(lambda: torch.Event(device, enable_timing=True), self.times.learn)

    def begin_pass(self) -> None:
        """Note that a pass begins; waits while the device has as many under way as it may have."""
        self._begun_at = self._now()
        if self._watch is not None:
            self._mark = self._watch.begin()

    def end_pass(self, tokens: int) -> None:
        """Note that the device was given all of a pass over `tokens` tokens."""
        self._latest = tokens, self._now() - self._begun_at
        if self._watch is not None:
            self._watch.end(self._mark, tokens)

    @property
    def latest_s(self) -> float:
        """Seconds of the latest pass: until it was done, or on an accelerator under way."""
        return self._latest[1]

    def learn(self, *, decodes: bool) -> None:
        """Learn from the pass that has ended, or on an accelerator from those that are done by now.

        Args:
            decodes: whether the one that has ended was over nothing but single tokens.
        """
        if decodes:
            self.decode_s += self._latest[1]
        if self._watch is None:
            self.times.learn(*self._latest)
        else:
            self._watch.catch_up()


class QueuedStep(Work):
    """A step and its progress. All but what a `Work` has belongs to the engine's turns."""

    def __init__(self, task: StepTask[Any], patience_s: float, learned: LearnedTimes, now: float) -> None:
        super().__init__(now)
        self.task = task
        self.client = task.client
        self.session = task.session
        self.learned = learned
        self.expires_at = now + patience_s if patience_s else math.inf
        self.rows, self.tokens = task.shape
        self.past = task.past
        """Tokens that its cache held before the step."""
        self.decode = is_decode(self.rows, self.tokens, self.past, learned.cost)
        self.passed_over = 0
        self.tokens_done = 0
        self.piece_tokens = 0
        """While the step's next tokens run over some rows at a time: how many tokens; else 0."""
        self.part: StepPart | None = None
        """All of the step, once it was prepared."""
        self.outputs: list[Tensor] = []
        self._row_outputs: list[Tensor] = []
        self.started_at = 0.0

    def as_waiting(self, key: int, served: ServedBefore, now: float) -> WaitingStep:
        """What the scheduler needs to know of it.

        Args: served: what its client has had, see `HostShares`.
        """
        return WaitingStep(
            key,
            served,
            self.rows_left,
            self.piece_tokens or self.tokens_left,
            self.decode,
            now - self.queued_at,
            self.passed_over,
            self.past + self.tokens_done,
            self.cuts_rows,
            bool(self.piece_tokens),
            self.client,
        )

    @property
    def tokens_left(self) -> int:
        return self.tokens - self.tokens_done

    @property
    def rows_left(self) -> int:
        """Rows that the step's next tokens have still to run over."""
        return self.rows - sum(output.shape[0] for output in self._row_outputs)

    @property
    def cuts_rows(self) -> bool:
        """Whether it may run over some of its rows at a time, as far as is known before it was prepared."""
        if self.rows == 1 or not self.past + self.tokens_done:
            return False
        return self.part is None or bool(self.piece_tokens) or self.part.cache.cuts_rows

    def work(self, tokens: int, rows: int) -> float:
        """The work of the step's next `tokens` tokens of `rows` rows; see `AttentionCost`."""
        if self.decode:
            return rows * tokens
        return self.learned.cost.work(rows, tokens, self.past + self.tokens_done)

    def prepare(self, now: float) -> None:
        self.started_at = now
        self.part = self.task.prepare()
        self.past = self.part.cache.tokens
        if (cached := self.task.cached_output) is not None:
            self.past -= cached.shape[1]
            self.add_output(cached)

    def chunk(self, tokens: int, rows: int) -> StepPart:
        """The step's next `tokens` tokens of the next `rows` rows. Rows before the last need `cuts_rows`."""
        part = self.part
        assert part is not None
        if tokens == self.tokens and rows == self.rows:
            return part
        cache, first = part.cache, self.rows - self.rows_left
        if rows < self.rows:
            if not self.piece_tokens:
                cache.begin_rows(tokens)
                self.piece_tokens = tokens
            cache = cache.rows(first, first + rows)
        of_rows, of_tokens = slice(first, first + rows), slice(self.tokens_done, self.tokens_done + tokens)
        mask, positions = part.attention_mask, part.position_ids
        if positions is not None and len(positions) > 1:
            positions = positions[of_rows]
        return StepPart(
            part.hidden[of_rows, of_tokens],
            cache,
            None if mask is None else mask[of_rows, : self.past + of_tokens.stop],
            None if positions is None else positions[:, of_tokens],
        )

    def add_output(self, output: Tensor) -> None:
        if self.piece_tokens:
            self._row_outputs.append(output)
            if self.rows_left:
                return
            assert self.part is not None
            self.part.cache.end_rows(self.piece_tokens)
            output = torch.cat(self._row_outputs)
            self.piece_tokens, self._row_outputs = 0, []
        self.outputs.append(output)
        self.tokens_done += output.shape[1]

    def rewind(self) -> None:
        """Leave the cache as it was before the step, which is done as a whole or not at all."""
        if self.part is not None:
            self.part.cache.rewind(self.past)


@dataclass
class _ClientsWork:
    """What one client has waiting for a stage."""

    of_decode: int = 0
    of_others: int = 0
    each: list[int] = field(default_factory=list)
    """Of its steps, one by one."""


class WorkAhead:
    """What a step finds waiting when it arrives, without counting it anew for each step of a crowd."""

    def __init__(self) -> None:
        self._counted_at = -math.inf
        self._counted: dict[LearnedTimes, dict[Holder, _ClientsWork]] = {}
        self._number = 0
        """Of the steps and jobs that were counted."""

    def of(
        self, works: Collection[Work], rows: int, tokens: int, client: Holder, chunk_tokens: int, now: float
    ) -> Ahead:
        """What a step of `rows` x `tokens` of a client would have to wait for if it came now.

        A step of few tokens waits for the sum of what is here; where many wait, that changes little from one
        arrival to the next. Of another client's crowd of decode steps only few run before it, or beside it.
        A longer step waits for as much of each step of its own client, and of all of each other client's:
        however many steps another one has here, it is served as much as this one, and no more.
        """
        decode, number = tokens <= DECODE_TOKENS, len(works)
        is_old = now - self._counted_at > max(_COUNTED_FOR_S, number * _COUNTED_FOR_S_EACH)
        has_changed = not decode and abs(number - self._number) > _CHANGED_BY * self._number
        if number < _CROWD or is_old or has_changed:
            self._counted, self._counted_at, self._number = _work_of_clients(list(works)), now, number
        met_by = _as_met_by if decode else _as_met_by_prompt_of
        wait_s = sum(
            expected_wait_s(rows * tokens, decode, met_by(client, of), one.times, chunk_tokens)
            for one, of in self._counted.items()
        )
        return Ahead(number, wait_s)


def _work_of_clients(works: Iterable[Work]) -> dict[LearnedTimes, dict[Holder, _ClientsWork]]:
    """The work that each client has left on each stage."""
    left: dict[LearnedTimes, dict[Holder, _ClientsWork]] = {}
    for work in works:
        if isinstance(work, QueuedStep):
            of_client = left.setdefault(work.learned, {}).setdefault(work.client, _ClientsWork())
            amount = int(work.work(work.tokens_left, work.rows_left))
            of_client.each.append(amount)
            if work.decode:
                of_client.of_decode += amount
            else:
                of_client.of_others += amount
    return left


def _as_met_by(client: Holder, of_stage: Mapping[Holder, _ClientsWork]) -> list[int]:
    """The work that a decode step of a client has to wait for."""
    own = of_stage.get(client, _ClientsWork())
    others = _others(client, of_stage)
    return [own.of_decode + own.of_others, *(min(decode, _MOST_MET) + rest for decode, rest in others)]


def _as_met_by_prompt_of(client: Holder, of_stage: Mapping[Holder, _ClientsWork]) -> list[int]:
    """The same for a longer step: one by one of the client's own, in sum of each other one's."""
    own = of_stage[client].each if client in of_stage else []
    return [decode + rest for decode, rest in _others(client, of_stage)] + own


def _others(client: Holder, of_stage: Mapping[Holder, _ClientsWork]) -> Iterable[tuple[int, int]]:
    """The work of decode steps and of others that each other client has here, or each other host.

    Beside a client's own, another host has one share, however many clients come from it.
    """
    each: dict[Holder, tuple[int, int]] = {}
    for other, one in of_stage.items():
        if other != client:
            own_host = client == NOBODY or other.host == client.host
            who = other if own_host else Holder(other.host, "")
            decode, rest = each.get(who, (0, 0))
            each[who] = decode + one.of_decode, rest + one.of_others
    return each.values()


def in_turn(
    steps: Sequence[QueuedStep], limits: PassLimits, recent: Mapping[Holder, int] = NO_CLIENTS
) -> Iterator[tuple[int, QueuedStep]]:
    """The steps that may run next, with their places: of each client's those that came first.

    Beside others a client with a crowd of sessions runs few of them at a time, and of prompts no pass has
    more than fit into a chunk. To look at all of them each time would take longer than to run them.

    Args: recent: the clients that have decoded lately, see `RecentClients`.
    """
    here = Counter([step.client for step in steps])
    decodes: dict[LearnedTimes, dict[Holder, float]] = {}
    prompts: dict[LearnedTimes, dict[Holder, float]] = {}
    for key, step in enumerate(steps):
        left = decodes if step.decode else prompts
        if (of_stage := left.get(step.learned)) is None:
            most: float = 1 + limits.chunk_tokens // DECODE_TOKENS
            if step.decode:
                most = _most_considered(here, step.learned, limits, recent)
            of_stage = left[step.learned] = dict.fromkeys(here, most)
        if (of_client := of_stage[step.client]) > 0:
            of_stage[step.client] = of_client - 1
            yield key, step


def _most_considered(
    here: Mapping[Holder, int], learned: LearnedTimes, limits: PassLimits, recent: Mapping[Holder, int]
) -> float:
    """How many decode steps of each client are looked at, of those that wait for one stage."""
    clients = here.keys() | recent.keys()
    if len(clients) < 2:
        return MOST_DECODE_TOKENS
    of_each = (
        max(here.get(client, 1), learned.arrivals.sessions_of(client)) * recent.get(client, 1)
        for client in clients
    )
    return min(_MOST_CONSIDERED, most_beside(min(of_each), len(clients), learned.times, limits))


class EnginePause:
    """A moment in which an engine runs nothing, though there are steps; more of the same clients end it not.

    Attributes:
        works: how many works have come.
    """

    _S, _S_EACH = 0.001, 0.00001
    """Seconds until the scheduler is asked again, and for each step that it looked at in vain."""

    def __init__(self) -> None:
        self.works = 0
        self._until, self._clients = -math.inf, frozenset[Holder]()

    def begin(self, steps: Sequence[QueuedStep], works: int, now: float) -> float:
        """Begin one, and return its seconds.

        Args: works: how many had come before these steps were looked at. What has come since rings again.
        """
        seconds = self._S + len(steps) * self._S_EACH
        self._until, self._clients = now + seconds, frozenset(step.client for step in steps)
        if self.works != works:
            self._end()
        return seconds

    def came(self, work: Work) -> None:
        """A work has come."""
        self.works += 1
        if not isinstance(work, QueuedStep) or work.client not in self._clients:
            self._end()

    def left_s(self, now: float) -> float:
        """Seconds that are left of it; at most 0: it is over."""
        return self._until - now

    def _end(self) -> None:
        self._until, self._clients = -math.inf, frozenset()


class ClientAccounts:
    """What the clients of a device have had of it, and what others owe them.

    Attributes:
        shares: what each has been served.
        recent: those that have decoded lately.
    """

    def __init__(self) -> None:
        self.shares = HostShares()
        self.recent = RecentClients()
        self._delays: Delays | None = None
        """From the first time on that clients share the device, with others or with training."""

    def ran_job(self, bulk: bool, now: float) -> None:
        """A job was run, which may be for training."""
        if self._delays is None and bulk and self.recent.at(now):
            self._delays = Delays()

    def owed(self, now: float) -> Mapping[Holder, Owed]:
        """What others owe clients that they have delayed too much."""
        return NOTHING_OWED if self._delays is None else self._delays.owed(now)

    def just_served(self, owed: Mapping[Holder, Owed], times: PassTimes, now: float) -> Set[Holder]:
        """The clients that have decoded so lately that they can wait while another is owed something."""
        return self.recent.within(OTHERS_WAIT_PASSES * times.of(1), now) if owed else frozenset()

    def ran(
        self, steps: Sequence[QueuedStep], works: Sequence[float], took: Pass, waiting: Mapping[Holder, int]
    ) -> None:
        """A pass over these steps is over.

        Args:
            works: what was done for each of them.
            waiting: how many steps each client had there when it began, those that ran included; of none if
                nothing else was to be done.
        """
        for step, work in zip(steps, works, strict=True):
            self.shares.serve(step.client, work)
        if self._delays is None and len(waiting) > 1:
            self._delays = Delays()
        if self._delays is not None:
            decodes = [step for step in steps if step.decode]
            self._delays.ran(decodes, took, waiting, self.recent.at(took.done))
