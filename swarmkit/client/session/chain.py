"""A session over a chain of servers that survives them (Borzunov et al., NeurIPS 2023, Algorithm 1).

The client keeps, for every stage of its route, the inputs that it sent there. When a server fails, its blocks
are routed anew, possibly over several servers with other boundaries; the first of them is sent the kept
inputs, the next one the outputs of the first, and so on, until all caches stand where the lost one stood.

For stage i of the chain, at a step that extends the session from `position` n to `end`::

    0 ──────────── held ────────────── n ───────────── end
    │ server has it │ replay (history) │  new inputs    │      sent:   [start, end), start = min(held, want)
                    │ want ─ what stage i + 1 lacks ────│      wanted: [want, end),  want <= n

In the usual step held = want = n on every stage. A replacement has held = 0; one that has no history of its
own makes its predecessor's want 0 too. So replay, split and the step itself are one and the same operation.

Where stages stand alike (held = want = n) and their servers are linked, only the first of them is sent its
inputs: each server hands its outputs on to the next, and to the client, who keeps them for the case that the
next one is lost. What was not answered then is done again from there, by the operation above.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import anyio
import torch

from swarmkit.client.adapters.tuning import ClientAdapter, ServerAdapter
from swarmkit.client.routing.route import Hop
from swarmkit.client.session.codecs import agree, answer_codecs
from swarmkit.client.session.history import History
from swarmkit.client.session.interrupt import interruptible
from swarmkit.client.session.pipeline import pieces, run_pipeline
from swarmkit.client.session.remote_stage import (
    NotPushedError,
    RemoteStage,
    Request,
    StepInputs,
    StepResult,
    at_once,
    off_loop,
)
from swarmkit.client.session.restore_prefix import restore_prefix
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.client.swarm.route_search import RouteSearch
from swarmkit.errors import (
    NoRouteError,
    PeerError,
    PeerTimeoutError,
    PeerUnreachableError,
    RemoteError,
    SessionError,
)
from swarmkit.events import HopTrace, PeerReplaced, Rerouted, RoutePlanned, StepFinished
from swarmkit.net.protocol.messages import SENDERS_FAULT

logger = logging.getLogger(__name__)


@dataclass
class _Loss:
    """A server that was lost in this step, or left because it had no room."""

    hop: Hop
    at: float
    busy: bool = False


class _StepExecution:
    """The work of one `ChainSession.step`."""

    def __init__(self, inputs: StepInputs, search: RouteSearch) -> None:
        self.inputs = inputs
        self.search = search
        self.position = inputs.position
        self.end = inputs.end
        self.rows = inputs.rows
        self.arrived_at = 0.0
        """When the outputs of the stage before were here, on the client's clock."""
        self.losses: list[_Loss] = []
        self.hops: list[HopTrace] = []
        self.refusals = 0
        self.recalled = 0

    def begin_at(self, position: int) -> None:
        """Everything up to `position` is done already."""
        self.inputs.position = self.position = position
        self.recalled = position

    @property
    def size(self) -> int:
        """Rows x tokens that a server holds after it."""
        return self.rows * self.end


class ChainSession:
    """Keys and values of `position` tokens, kept by servers; blocks [start, stop) of the model.

    One step at a time. `crop` and `reorder` take effect at once here, and on the servers with the next step.
    """

    def __init__(self, swarm: SwarmClient, max_length: int, start: int = 0, stop: int | None = None) -> None:
        self._swarm = swarm
        self._lock = anyio.Lock()
        self._stages: list[RemoteStage] = []
        self._numbers = 0
        self._positions: torch.Tensor | None = None
        self._closed = False
        self._plain = swarm.memory.enabled
        """Whether this session can be remembered: one row all the time, no padding, the usual positions."""
        self._outputs = History()
        """Of the last stage, as long as the session can be remembered."""
        self._inputs = History() if swarm.settings.transfer.codecs else None
        """What came from the user, where codecs may have made others of it; as long, too."""
        self.start = start
        self.stop = swarm.model.num_blocks if stop is None else stop
        self.max_length = max_length
        self.tuning: ClientAdapter | ServerAdapter | None = None
        """What changes the blocks in all its steps."""
        self.position = 0
        self.rows = 0
        self.owner = swarm.new_owner("session")
        """Names this session in events."""
        self.latest: StepFinished | None = None

    @property
    def route(self) -> list[Hop]:
        """The servers in use, in order; empty before the first step."""
        return [stage.hop for stage in self._stages]

    @property
    def _hosting(self) -> str:
        return "" if self.tuning is None else self.tuning.hosting

    @property
    def history_bytes(self) -> int:
        """What is kept here so that no server is needed for ever."""
        return sum(stage.history.nbytes for stage in self._stages)

    def crop(self, tokens: int) -> None:
        """Forget every position from `tokens` on."""
        if not 0 <= tokens <= self.position:
            raise SessionError(f"cannot keep {tokens} of {self.position} tokens")
        self.position = tokens
        for ends in filter(None, (self._inputs, self._outputs)):
            ends.crop(tokens)
        for stage in self._stages:
            stage.crop(tokens)

    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row order[i] was; `order` may be longer or shorter than the batch."""
        if any(not 0 <= row < self.rows for row in order) or not order:
            raise SessionError(f"order {list(order)[:8]} does not name rows of a batch of {self.rows}")
        self.rows = len(order)
        if self._positions is not None:
            self._positions = self._positions[list(order)]
        for stage in self._stages:
            stage.reorder(order)

    async def retune(self, tuning: ClientAdapter | ServerAdapter | None) -> None:
        """Let something else change the blocks, from the beginning on: nothing is held now."""
        for stage in self._stages:
            stage.drop()
        self._stages, self.tuning, self._plain = [], tuning, False

    def close(self) -> None:
        """End the session; servers free what they hold. Call on the event loop's thread; never blocks."""
        if not self._closed and self._plain and not self._lock.locked():
            self._remember()
        self._closed = True
        for stage in self._stages:
            stage.drop()

    async def step(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the session's blocks over new positions.

        Args:
            hidden: [batch, tokens, hidden], on the CPU.
            mask: [batch, position + tokens], uint8, 1 = attend; None = no padding.
            positions: [batch, tokens], int64; None = position, position + 1, …

        Returns: [batch, tokens, hidden], in the dtype of `hidden`.

        Raises:
            SessionError: the session is closed, or would become longer than `max_length`.
            NoRouteError: nobody served some blocks for `route_timeout_s` seconds.
            RemoteError: two servers refused the step as malformed.
            DeadlineError: it took longer than the client's `step_deadline_s`.
        """
        async with self._lock:
            try:
                with interruptible(lambda: self._stages, self._swarm.settings.deadlines.step_deadline_s):
                    return await self._step(hidden, mask, positions)
            finally:
                self._give_up_pushes(0)
                if self._closed:  # while it was under way
                    self.close()

    async def _step(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        self._check_open()
        rows, tokens, _ = hidden.shape
        if self.position and rows != self.rows:
            raise SessionError(f"the session holds {self.rows} rows, the step has {rows}")
        end = self.position + tokens
        if end > self.max_length:
            raise SessionError(
                f"{end} tokens are more than this session's max_length of {self.max_length}; "
                "open one with a larger max_length"
            )
        started = self._swarm.clock.now()
        all_positions = self._merged_positions(rows, end, positions)
        self._plain = self._plain and rows == 1 and mask is None and all_positions is None
        inputs = StepInputs(self.position, end, rows, mask, all_positions)
        work = _StepExecution(inputs, RouteSearch(self._swarm, self.owner, self._hosting))
        await self._prepare(work)
        agree(self._swarm, self._stages, self._outputs, hidden)
        if self._plain and self._inputs is not None:
            self._inputs.write(self.position, hidden)
        recalled = await self._recall(hidden, work) if self._plain and not self._numbers else None

        work.arrived_at = self._swarm.clock.now()
        arrived, arrived_from = hidden[:, work.recalled :], work.position
        index = 0
        while index < len(self._stages):
            stage = self._stages[index]
            await off_loop(arrived.nbytes, lambda: stage.note_inputs(arrived_from, arrived, work.end))  # noqa: B023
            want = self._wanted_from(index, work)
            try:
                output = await self._run(index, want, work)
            except PeerError as error:
                self._check_open()
                self._give_up_pushes(index)
                if isinstance(error, NotPushedError):
                    self._part(index)
                else:
                    await self._replace(index, error, work)
                continue
            work.search.progress()
            arrived, arrived_from = output, want
            index += 1

        if self._plain:
            self._outputs.write(work.position, arrived)
        self.position, self.rows, self._positions = end, rows, all_positions
        self._note(work, tokens, started)
        if recalled is not None:
            arrived = torch.cat([recalled.to(arrived.dtype), arrived], dim=1)
        return arrived.to(hidden.dtype)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed; open a new one with model.session()")

    def _wanted_from(self, index: int, work: _StepExecution) -> int:
        """From which position on the next stage needs this stage's outputs."""
        if index + 1 == len(self._stages):
            return work.position
        return min(work.position, self._stages[index + 1].history.tokens)

    def _merged_positions(self, rows: int, end: int, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Position ids of the whole session [batch, end], or None while they are the default ones."""
        if self.position == 0:
            return positions
        if positions is None and self._positions is None:
            return None
        default = torch.arange(end).expand(rows, -1)
        known = default if self._positions is None else self._positions
        new = default[:, self.position :] if positions is None else positions
        return torch.cat([known[:, : self.position], new], dim=1)

    # ------------------------------------------------------------------ what is known already

    async def _recall(self, hidden: torch.Tensor, work: _StepExecution) -> torch.Tensor | None:
        """Begin where an earlier session was, as far as servers have kept its pages.

        Returns: the outputs [1, tokens, hidden] of all that need not be sent; None if there is nothing such.
        """
        found = await restore_prefix(self._swarm.memory, hidden[0], self._stages, self.stop, self.max_length)
        self._check_open()
        if found is None:
            return None
        entry, begin, held = found
        for stage in self._stages:
            stage.history.write(0, entry.states[stage.hop.start][None, :begin])
            stage.held = min(held[stage], begin)
        outputs = entry.states[self.stop][None, :begin]
        self._outputs.write(0, outputs)
        work.begin_at(begin)
        return outputs

    def _remember(self) -> None:
        """Keep this session's hidden states for later ones that begin alike."""
        parts = {stage.hop.start: stage.history for stage in self._stages} | {self.stop: self._outputs}
        states = {boundary: history.row(self.position) for boundary, history in parts.items()}
        found = {boundary: part for boundary, part in states.items() if part is not None}
        if self.position and len(found) == len(states):
            inputs = None if self._inputs is None else self._inputs.row(self.position)
            self._swarm.memory.keep(found, inputs)

    # ------------------------------------------------------------------ one stage

    async def _run(self, index: int, want: int, work: _StepExecution) -> torch.Tensor:
        """Bring a stage to `work.end`; returns its outputs of positions [want, end)."""
        stage = self._stages[index]
        try:
            self._check_open()
            if stage.is_pushed_to:
                answers = await self._take_pushed(index, work)
            else:
                self._give_up_pushes(index)
                if stage.conversation is None:
                    await stage.open(self.max_length)
                    self._check_open()
                run = [stage, *self._followers(index, want, work)]
                if len(run) > 1:
                    answers = await self._run_linked(run, work)
                else:
                    answers = await self._run_alone(stage, want, work)
            stage.held = work.end
        except NotPushedError:
            raise  # the session there is as it was
        except BaseException as error:
            # Also when cancelled: an answer that nobody waits for must not be taken for the next one.
            if not stage.survives(error):
                stage.drop()
            raise
        self._swarm.bans.worked(stage.hop.server.peer_id)
        outputs = [answer.output for answer in answers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    async def _run_alone(self, stage: RemoteStage, want: int, work: _StepExecution) -> list[StepResult]:
        """Exchange messages with one server until it stands at `work.end`."""
        low = min(stage.held, want)
        work.arrived_at = self._swarm.clock.now()
        answers = []
        for start, stop in pieces(low, work.end, 1, max(1, stage.max_step_tokens // work.rows)):
            request = self._request(start, stop, want, work)
            if want == work.position:  # else outputs are wanted for a replay too, as they are
                request.answers = answer_codecs([stage], self._stages, self._outputs)
            answers.append(await self._exchange(stage, request, work))
        return answers

    async def _exchange(
        self, stage: RemoteStage, request: Request, work: _StepExecution, forward: int = 0
    ) -> StepResult:
        """Send a request and take the answer to it."""
        await stage.send(request, work.inputs, forward)
        self._check_open()
        answer = await stage.take(request, stage.deadline_s(request))
        self._account(stage, [answer], request.size, work)
        return answer

    async def _run_linked(self, run: list[RemoteStage], work: _StepExecution) -> list[StepResult]:
        """Send the first of some linked servers its inputs; returns its answers.

        A short step is then taken from each of the others in its turn, a long one has come from all of them.
        """
        first, followers = run[0], run[1:]
        work.arrived_at = self._swarm.clock.now()
        most = min(stage.max_step_tokens for stage in run) // work.rows
        cuts = pieces(work.position, work.end, len(run), max(1, most))
        requests = [self._request(low, high, work.position, work) for low, high in cuts]
        for request in requests:
            request.answers = answer_codecs(run, self._stages, self._outputs)
        for follower in followers:
            follower.expect(requests)
        if len(requests) > 1:
            first.expect(requests)
            await run_pipeline(run, requests, work.inputs)
            self._check_open()  # who closes a session takes the answers away, too
            return await self._take_pushed(self._stages.index(first), work)
        answer = await self._exchange(first, requests[0], work, len(followers))
        self._see_whether_forwarded(first, followers[0], answer)
        return [answer]

    async def _take_pushed(self, index: int, work: _StepExecution) -> list[StepResult]:
        """The answers to what was pushed to a stage; those of a long step are here already."""
        stage = self._stages[index]
        size = work.rows * (work.end - work.position)
        if stage.failure is not None:
            raise stage.failure
        if stage.pending:
            answer = await stage.take(stage.pending[0], stage.deadline_s(stage.pending[0]), pushed=True)
            stage.pending.clear()
            answers = [answer]
            if index + 1 < len(self._stages) and self._stages[index + 1].pending:
                self._see_whether_forwarded(stage, self._stages[index + 1], answer)
        else:
            answers = list(stage.answers)
            stage.answers.clear()
        self._account(stage, answers, size, work)
        return answers

    def _see_whether_forwarded(self, stage: RemoteStage, following: RemoteStage, answer: StepResult) -> None:
        if not answer.done.forwarded:
            stage.unlink()
            self._give_up_pushes(self._stages.index(following))

    def _give_up_pushes(self, index: int) -> None:
        """Nothing is pushed to the stages from `index` on any more in this step."""
        for stage in self._stages[index:]:
            stage.give_up_pending()

    def _followers(self, index: int, want: int, work: _StepExecution) -> list[RemoteStage]:
        """The stages behind one that will be pushed what they need if that one is sent its inputs."""
        stage, found = self._stages[index], list[RemoteStage]()
        if not stage.held == want == work.position:
            return found
        for number in range(index + 1, len(self._stages)):
            before, following = self._stages[number - 1], self._stages[number]
            alike = following.held == following.history.tokens == work.position
            if not (before.is_linked_to(following) and alike and following.order == stage.order):
                break
            found.append(following)
        # The last of them must not be asked for more than the step's own outputs either.
        while found and self._wanted_from(index + len(found), work) != work.position:
            found.pop()
        return found

    def _request(self, low: int, high: int, want: int, work: _StepExecution) -> Request:
        self._numbers += 1
        keep = high - min(max(low, want), high)
        return Request(self._numbers, low, high, keep, work.rows, self._swarm.clock.now())

    def _account(
        self, stage: RemoteStage, answers: list[StepResult], size: int, work: _StepExecution
    ) -> None:
        """Note how long a stage took: since the outputs of the one before were here."""
        last = max(answer.arrived_at for answer in answers)
        seconds = max(last - work.arrived_at, 0.0)
        # While stages worked at once, each of them was at work for longer than it was waited for.
        at_work = sum(answer.done.compute_ms + answer.done.queue_ms for answer in answers) / 1e3
        whole = last - answers[0].asked_at
        self._swarm.times_of(stage.hop.server).observe(size, max(seconds, min(at_work, whole)))
        work.hops.append(stage.trace(answers, seconds))
        work.arrived_at = max(last, work.arrived_at)

    # ------------------------------------------------------------------ routes

    async def _prepare(self, work: _StepExecution) -> None:
        """Have a route; move away from servers that said they leave."""
        if not self._stages:
            route = await work.search.find(self.start, self.stop, work.size, None)
            self._stages = [RemoteStage(self._swarm, hop, tuning=self.tuning) for hop in route]
            self._swarm.events.emit(
                RoutePlanned(tuple(map(str, route)), time=self._swarm.clock.time(), owner=self.owner)
            )
        for stage in [stage for stage in self._stages if stage.leaving]:
            self._move_away(stage, work)
        if self._swarm.settings.transfer.push and len(self._stages) > 1 and not self._is_linked():
            await self._link(work)

    def _is_linked(self) -> bool:
        """Whether every server is linked to the next one, or cannot be."""
        return all(
            before.is_linked_to(following)
            or not self._swarm.may_link(before.hop.server, following.hop.server)
            for before, following in pairwise(self._stages)
        )

    async def _link(self, work: _StepExecution) -> None:
        """Open all sessions, and have each server hand its outputs on to the next, as far as it can."""
        while errors := await at_once(
            {
                stage: lambda stage=stage: stage.open(self.max_length)  # type: ignore[misc]
                for stage in self._stages
                if stage.conversation is None
            }
        ):
            stage, error = next(iter(errors.items()))
            for failed in errors:
                failed.drop()
            self._check_open()
            await self._replace(self._stages.index(stage), error, work)
        self._check_open()
        errors = await at_once(
            {
                before: lambda before=before, following=following: self._try_link(before, following)  # type: ignore[misc]
                for before, following in pairwise(self._stages)
                if before.conversation and following.conversation and not before.is_linked_to(following)
            }
        )
        for stage in errors:
            stage.drop()  # what became of it is seen, and told, when it is needed

    async def _try_link(self, before: RemoteStage, following: RemoteStage) -> None:
        one, other = before.hop.server, following.hop.server
        if self._swarm.may_link(one, other) and not await before.link(following):
            self._swarm.cannot_link(one, other)
            logger.info("%s cannot reach %s: this client hands its outputs on", one.label, other.label)

    def _part(self, index: int) -> None:
        """Have nothing more pushed to a stage, which found what was pushed to it wrong."""
        before, stage = self._stages[index - 1], self._stages[index]
        self._swarm.cannot_link(before.hop.server, stage.hop.server)
        before.unlink()

    def _move_away(self, stage: RemoteStage, work: _StepExecution) -> None:
        """Route a stage's blocks anew if others hold them; else stay, and look around meanwhile."""
        hop, swarm = stage.hop, self._swarm
        leaving = frozenset(other.hop.server.peer_id for other in self._stages if other.leaving)
        try:
            route = swarm.plan(hop.start, hop.stop, leaving, work.size, self._hosting)
        except NoRouteError:
            swarm.look_soon()
            return
        if not all(map(swarm.may_use, route)):
            swarm.look_soon()
            return
        self._lose(stage, work, "is leaving")
        self._splice(self._stages.index(stage), route)

    async def _replace(self, index: int, error: PeerError, work: _StepExecution) -> None:
        """Put others in the place of a stage that failed."""
        stage = self._stages[index]
        peer_id = stage.hop.server.peer_id
        if not self._swarm.settings.sessions.recovery and self.position:
            raise error
        if isinstance(error, RemoteError) and error.is_busy:
            return await self._go_round(index, error, work)
        if isinstance(error, RemoteError) and error.code in SENDERS_FAULT:
            work.refusals += 1
            if work.refusals >= 2:
                raise error
        if isinstance(error, PeerTimeoutError) and index:
            # Perhaps the one before never pushed what it said it pushed: it will not be asked to again.
            self._swarm.cannot_link(self._stages[index - 1].hop.server, stage.hop.server)
        self._swarm.bans.failed(peer_id)
        self._lose(stage, work, _reason(error))
        route = await work.search.find(stage.hop.start, stage.hop.stop, work.size, error)
        self._splice(index, route)

    async def _go_round(self, index: int, error: RemoteError, work: _StepExecution) -> None:
        """Use others in the place of a busy server, or wait for it where it is the first to have room."""
        stage, hop, since = self._stages[index], self._stages[index].hop, self._swarm.clock.now()
        self._swarm.note_refusal(hop, error, self.owner)
        route = await work.search.find(hop.start, hop.stop, work.size, error)
        self._check_open()
        if [(other.server.peer_id, other.stop) for other in route] == [(hop.server.peer_id, hop.stop)]:
            return  # what it holds of the session, it may have kept
        stage.drop()
        work.losses.append(_Loss(hop, since, busy=True))
        self._splice(index, route)

    def _lose(self, stage: RemoteStage, work: _StepExecution, reason: str) -> None:
        hop = stage.hop
        stage.drop()
        work.losses.append(_Loss(hop, self._swarm.clock.now()))
        self._swarm.note_loss(hop, reason, self.owner)

    def _splice(self, index: int, route: list[Hop]) -> None:
        """Replace a stage by the hops of `route`; the first of them inherits its history."""
        inherited = self._stages[index].history
        new = [
            RemoteStage(self._swarm, hop, inherited if number == 0 else None, self.tuning)
            for number, hop in enumerate(route)
        ]
        self._stages[index : index + 1] = new

    # ------------------------------------------------------------------ account

    def _note(self, work: _StepExecution, tokens: int, started: float) -> None:
        now = self._swarm.clock.now()
        for loss in work.losses:
            covering = [
                hop for hop in self.route if loss.hop.start <= hop.start and hop.stop <= loss.hop.stop
            ]
            event = Rerouted if loss.busy else PeerReplaced
            self._swarm.events.emit(
                event(
                    loss.hop.server.peer_id,
                    loss.hop.server.label,
                    tuple(hop.server.peer_id for hop in covering),
                    tuple(str(hop) for hop in covering),
                    work.position,
                    (now - loss.at) * 1e3,
                    time=self._swarm.clock.time(),
                    owner=self.owner,
                )
            )
        self.latest = StepFinished(
            work.position,
            work.rows,
            tokens - work.recalled,
            (now - started) * 1e3,
            tuple(work.hops),
            not all(loss.busy for loss in work.losses),
            work.recalled,
            time=self._swarm.clock.time(),
            owner=self.owner,
        )
        self._swarm.events.emit(self.latest)


def _reason(error: PeerError) -> str:
    if isinstance(error, PeerUnreachableError):
        return "connection lost"
    if isinstance(error, RemoteError):
        return f"{error.code}: {error}"
    return str(error)
