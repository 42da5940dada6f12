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
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.to_thread
import torch

from swarmkit.client.history import History
from swarmkit.client.routing import Hop
from swarmkit.client.swarm import SwarmClient
from swarmkit.client.trace import HopTrace, PeerLost, PeerReplaced, RoutePlanned, StepTrace, Waiting
from swarmkit.errors import (
    NoRouteError,
    PeerError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    RemoteError,
    SessionError,
    SwarmkitError,
)
from swarmkit.net import codec
from swarmkit.net.codec import TensorSpec
from swarmkit.net.conversation import Conversation, Received
from swarmkit.net.messages import SENDERS_FAULT, Fault, Message, Open, Opened, Step, StepDone
from swarmkit.net.patience import Patience

T = TypeVar("T")

logger = logging.getLogger(__name__)

_HIDDEN_DTYPES = ("float32", "bfloat16", "float16")
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_LARGE_BYTES = 1024 * 1024
"""Tensors of this size and above are copied and checked off the event loop."""


class _Stage:
    """One hop of the route, with its stream and what is needed to do without it."""

    def __init__(self, hop: Hop, history: History | None = None) -> None:
        self.hop = hop
        self.history = history or History()
        self.held = 0
        """Tokens that the server's cache holds, as far as they are still wanted."""
        self.order: tuple[int, ...] | None = None
        """Reordering of rows that the server has not been told yet."""
        self.conversation: Conversation | None = None
        self.patience: Patience
        self.max_step_tokens = 1
        self.leaving = False

    def converse(self, conversation: Conversation) -> None:
        """Talk to the server over this stream from now on."""
        self.conversation = conversation
        self.patience = Patience(conversation)

    def drop(self) -> None:
        """Give the stream up; the server frees its cache, and nothing is held there any more."""
        if self.conversation is not None:
            self.patience.close()
            self.conversation.close()
        self.conversation = None
        self.held = 0
        self.order = None

    def crop(self, tokens: int) -> None:
        self.history.crop(tokens)
        self.held = min(self.held, tokens)

    def reorder(self, order: Sequence[int]) -> None:
        self.history.reorder(order)
        self.order = tuple(order if self.order is None else (self.order[row] for row in order))


@dataclass
class _Loss:
    """A server that was lost in this step."""

    hop: Hop
    at: float


class _Step:
    """The work of one `ChainSession.step`."""

    def __init__(self, position: int, end: int, rows: int) -> None:
        self.position = position
        self.end = end
        self.rows = rows
        self.losses: list[_Loss] = []
        self.hops: list[HopTrace] = []
        self.refusals = 0
        self.give_up_at: float | None = None
        """Until when a route is looked for, on the event loop's clock; None while all goes well."""
        self.pause_s = _FIRST_PAUSE_S
        self.told_waiting = False

    def progress(self) -> None:
        """A stage did its part: patience begins anew."""
        self.give_up_at = None
        self.pause_s = _FIRST_PAUSE_S


class ChainSession:
    """Keys and values of `position` tokens, kept by servers; blocks [start, stop) of the model.

    One step at a time. `crop` and `reorder` take effect at once here, and on the servers with the next step.
    """

    def __init__(self, swarm: SwarmClient, max_length: int, start: int = 0, stop: int | None = None) -> None:
        self._swarm = swarm
        self._lock = anyio.Lock()
        self._stages: list[_Stage] = []
        self._positions: torch.Tensor | None = None
        self._closed = False
        self.start = start
        self.stop = swarm.model.num_blocks if stop is None else stop
        self.max_length = max_length
        self.position = 0
        self.rows = 0

    @property
    def route(self) -> list[Hop]:
        """The servers in use, in order; empty before the first step."""
        return [stage.hop for stage in self._stages]

    @property
    def history_bytes(self) -> int:
        """What is kept here so that no server is needed for ever."""
        return sum(stage.history.nbytes for stage in self._stages)

    def crop(self, tokens: int) -> None:
        """Forget every position from `tokens` on."""
        if not 0 <= tokens <= self.position:
            raise SessionError(f"cannot keep {tokens} of {self.position} tokens")
        self.position = tokens
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

    def close(self) -> None:
        """End the session; servers free what they hold. Call on the event loop's thread; never blocks."""
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
            NoRouteError: nobody served some blocks for `route_timeout` seconds.
            RemoteError: two servers refused the step as malformed.
        """
        async with self._lock:
            return await self._step(hidden, mask, positions)

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
        started = time.perf_counter()
        work = _Step(self.position, end, rows)
        await self._prepare(work)
        all_positions = self._merged_positions(work, positions)

        arrived, arrived_from = hidden, work.position
        index = 0
        while index < len(self._stages):
            stage = self._stages[index]
            await _off_loop(arrived.nbytes, lambda: stage.history.write(arrived_from, arrived))  # noqa: B023
            want = self._wanted_from(index, work)
            try:
                output = await self._run(stage, want, work, mask, all_positions)
            except PeerError as error:
                self._check_open()
                await self._replace(index, error, work)
                continue
            work.progress()
            arrived, arrived_from = output, want
            index += 1

        self.position, self.rows, self._positions = end, rows, all_positions
        self._note(work, tokens, started)
        return arrived.to(hidden.dtype)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed; open a new one with model.session()")

    def _wanted_from(self, index: int, work: _Step) -> int:
        """From which position on the next stage needs this stage's outputs."""
        if index + 1 == len(self._stages):
            return work.position
        return min(work.position, self._stages[index + 1].history.tokens)

    def _merged_positions(self, work: _Step, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Position ids of the whole session [batch, end], or None while they are the default ones."""
        if work.position == 0:
            return positions
        if positions is None and self._positions is None:
            return None
        default = torch.arange(work.end).expand(work.rows, -1)
        known = default if self._positions is None else self._positions
        new = default[:, work.position :] if positions is None else positions
        return torch.cat([known[:, : work.position], new], dim=1)

    # ------------------------------------------------------------------ one stage

    async def _run(
        self,
        stage: _Stage,
        want: int,
        work: _Step,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """Bring a stage to `work.end`; returns its outputs of positions [want, end)."""
        try:
            if stage.conversation is None:
                await self._open(stage)
            start = min(stage.held, want)
            span = max(1, stage.max_step_tokens // work.rows)
            outputs = []
            for low in range(start, work.end, span):
                high = min(low + span, work.end)
                outputs.append(await self._exchange(stage, low, high, want, work, mask, positions))
            stage.held = work.end
        except BaseException:
            # Also when cancelled: an answer that nobody waits for must not be taken for the next one.
            stage.drop()
            raise
        self._swarm.bans.worked(stage.hop.server.peer_id)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    async def _open(self, stage: _Stage) -> None:
        hop, swarm = stage.hop, self._swarm
        stage.converse(await swarm.converse(hop.server))
        message = Open(swarm.model.fingerprint, hop.start, hop.stop, self.max_length)
        # To open a session computes nothing: who is silent now would be found out later, and more slowly.
        reply = (await self._ask(stage, message, [], swarm.connect_timeout)).message
        if not isinstance(reply, Opened) or reply.max_step_tokens < 1:
            raise ProtocolError("the session was not opened as asked", hop.server.peer_id)
        stage.max_step_tokens = reply.max_step_tokens

    async def _exchange(
        self,
        stage: _Stage,
        low: int,
        high: int,
        want: int,
        work: _Step,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """One message there and back: positions [low, high) in, those of them from `want` on out."""
        server, width = stage.hop.server, self._swarm.model.hidden_size
        keep = high - min(max(low, want), high)
        size = work.rows * (high - low)
        spec, data = await _off_loop(size * width * 4, lambda: codec.encode(stage.history.read(low, high)))
        mask_spec, mask_data = (None, None) if mask is None else codec.encode(mask[:, :high])
        positions_spec, positions_data = (
            (None, None) if positions is None else codec.encode(positions[:, low:high])
        )
        message = Step(low, spec, keep, mask_spec, positions_spec, stage.order if low else None)
        payload = [part for part in (data, mask_data, positions_data) if part is not None]

        times = self._swarm.times_of(server)
        largest = work.rows * keep * width * 4
        started = time.perf_counter()
        try:
            received = await self._ask(
                stage, message, payload, times.deadline_s(size, self._swarm.policy), largest
            )
        except PeerTimeoutError:
            times.timed_out()
            raise
        reply = received.message
        if not isinstance(reply, StepDone):
            raise ProtocolError(f"expected StepDone, got {type(reply).__name__}", server.peer_id)
        shape = (work.rows, keep, width)
        output = await _off_loop(largest, lambda: _checked(reply, received, shape, server.peer_id))
        seconds = time.perf_counter() - started

        times.observe(size, seconds)
        stage.order = None
        stage.leaving = reply.leaving
        work.hops.append(_hop_trace(stage.hop, reply, seconds))
        return output

    async def _ask(
        self,
        stage: _Stage,
        message: Message,
        payload: list[memoryview],
        deadline_s: float,
        max_payload_bytes: int = 0,
    ) -> Received:
        """Send a message and wait for the answer to it."""
        self._check_open()
        conversation, server = stage.conversation, stage.hop.server
        assert conversation is not None
        conversation.max_payload_bytes = max_payload_bytes
        stage.patience.start(deadline_s)
        try:
            await conversation.send(message, payload)
            received = await conversation.receive()
        except PeerUnreachableError:
            if stage.patience.expired:
                raise PeerTimeoutError(f"silent for {deadline_s:.1f} s", server.peer_id) from None
            raise
        finally:
            stage.patience.stop()
        if isinstance(received.message, Fault):
            raise RemoteError(received.message.message, server.peer_id, received.message.code)
        return received

    # ------------------------------------------------------------------ routes

    async def _prepare(self, work: _Step) -> None:
        """Have a route; move away from servers that said they leave."""
        if not self._stages:
            route = await self._find_route(self.start, self.stop, work, None)
            self._stages = [_Stage(hop) for hop in route]
            self._swarm.emit(RoutePlanned(tuple(str(hop) for hop in route)))
        for stage in [stage for stage in self._stages if stage.leaving]:
            self._move_away(stage, work)

    def _move_away(self, stage: _Stage, work: _Step) -> None:
        """Route a stage's blocks anew if others hold them; else stay, and look around meanwhile."""
        hop, swarm = stage.hop, self._swarm
        leaving = frozenset(other.hop.server.peer_id for other in self._stages if other.leaving)
        try:
            route = swarm.plan(hop.start, hop.stop, without=leaving)
        except NoRouteError:
            swarm.look_soon()
            return
        if any(swarm.bans.is_banned(other.server.peer_id) for other in route):
            swarm.look_soon()
            return
        self._lose(stage, work, "is leaving")
        self._splice(self._stages.index(stage), route)

    async def _replace(self, index: int, error: PeerError, work: _Step) -> None:
        """Put others in the place of a stage that failed."""
        stage = self._stages[index]
        peer_id = stage.hop.server.peer_id
        if isinstance(error, RemoteError) and error.code in SENDERS_FAULT:
            work.refusals += 1
            if work.refusals >= 2:
                raise error
        self._swarm.bans.failed(peer_id)
        self._lose(stage, work, _reason(error))
        route = await self._find_route(stage.hop.start, stage.hop.stop, work, error)
        self._splice(index, route)

    def _lose(self, stage: _Stage, work: _Step, reason: str) -> None:
        hop = stage.hop
        stage.drop()
        work.losses.append(_Loss(hop, time.perf_counter()))
        self._swarm.emit(PeerLost(hop.server.peer_id, hop.server.label, hop.start, hop.stop, reason))

    def _splice(self, index: int, route: list[Hop]) -> None:
        """Replace a stage by the hops of `route`; the first of them inherits its history."""
        inherited = self._stages[index].history
        new = [_Stage(hop, inherited if number == 0 else None) for number, hop in enumerate(route)]
        self._stages[index : index + 1] = new

    async def _find_route(self, start: int, stop: int, work: _Step, error: PeerError | None) -> list[Hop]:
        """A route for some blocks; waits for a newcomer where there is none.

        Servers that are left aside are used only if nobody else has the blocks, and after a pause.
        """
        swarm = self._swarm
        while True:
            try:
                route = swarm.plan(start, stop)
            except NoRouteError:
                route = []
            if route and not any(swarm.bans.is_banned(hop.server.peer_id) for hop in route):
                return route
            if work.give_up_at is None:
                work.give_up_at = anyio.current_time() + swarm.settings.route_timeout
            left_s = work.give_up_at - anyio.current_time()
            if left_s <= 0:
                raise self._gave_up(start, stop, route, error) from error
            if not work.told_waiting:
                work.told_waiting = True
                swarm.emit(Waiting(swarm.unserved(start, stop), left_s))
            await anyio.sleep(min(work.pause_s, left_s))
            work.pause_s = min(work.pause_s * 2, _LONGEST_PAUSE_S)
            await self._look_up(work.give_up_at)
            if route:
                return self._route_or(route, start, stop)

    async def _look_up(self, give_up_at: float) -> None:
        """See who serves now, if that can be seen in time."""
        try:
            with anyio.move_on_after(give_up_at - anyio.current_time()):
                await self._swarm.refresh()
        except SwarmkitError as error:
            logger.warning("could not look up the swarm, will try again: %s", error)

    def _route_or(self, known: list[Hop], start: int, stop: int) -> list[Hop]:
        try:
            return self._swarm.plan(start, stop)
        except NoRouteError:
            return known

    def _gave_up(self, start: int, stop: int, route: list[Hop], error: PeerError | None) -> Exception:
        seconds = self._swarm.settings.route_timeout
        if not route:
            return self._swarm.no_route(start, stop)
        return NoRouteError(
            f"the only servers of blocks {start}:{stop} kept failing for {seconds:.0f} s ({error}); "
            "start another server for them, or try again later",
            [(start, stop)],
        )

    # ------------------------------------------------------------------ account

    def _note(self, work: _Step, tokens: int, started: float) -> None:
        now = time.perf_counter()
        for loss in work.losses:
            covering = [
                hop for hop in self.route if loss.hop.start <= hop.start and hop.stop <= loss.hop.stop
            ]
            self._swarm.emit(
                PeerReplaced(
                    loss.hop.server.peer_id,
                    loss.hop.server.label,
                    tuple(hop.server.peer_id for hop in covering),
                    tuple(str(hop) for hop in covering),
                    work.position,
                    (now - loss.at) * 1e3,
                )
            )
        self._swarm.trace.append(
            StepTrace(
                work.position, work.rows, tokens, (now - started) * 1e3, tuple(work.hops), bool(work.losses)
            )
        )


async def _off_loop(nbytes: int, work: Callable[[], T]) -> T:
    """Do quick work here, and work on many bytes in a thread, so that other sessions need not wait for it."""
    return work() if nbytes < _LARGE_BYTES else await anyio.to_thread.run_sync(work)


def _checked(reply: StepDone, received: Received, shape: tuple[int, int, int], peer_id: str) -> torch.Tensor:
    """A server's output, which is believed no further than can be seen."""
    spec: TensorSpec = reply.hidden
    if spec.shape != shape or spec.dtype not in _HIDDEN_DTYPES:
        raise ProtocolError(f"outputs must be {list(shape)}, got {list(spec.shape)} of {spec.dtype}", peer_id)
    output = received.tensor(spec)
    if not codec.is_finite(output):
        raise ProtocolError("the outputs contain NaN or infinity", peer_id)
    return output


def _hop_trace(hop: Hop, reply: StepDone, seconds: float) -> HopTrace:
    # A server's own times are claims: they cannot be more than what passed here.
    total_ms = seconds * 1e3
    compute_ms = min(max(reply.compute_ms, 0.0), total_ms)
    queue_ms = min(max(reply.queue_ms, 0.0), total_ms - compute_ms)
    return HopTrace(
        hop.server.peer_id,
        hop.server.label,
        hop.start,
        hop.stop,
        queue_ms,
        compute_ms,
        total_ms - compute_ms - queue_ms,
    )


def _reason(error: PeerError) -> str:
    if isinstance(error, PeerUnreachableError):
        return "connection lost"
    if isinstance(error, RemoteError):
        return f"{error.code}: {error}"
    return str(error)
