"""A session's part on one server: what it was sent, what it holds, and what became of the present step.

The history is all that is needed to do without the server: another one is sent it and holds the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import anyio.to_thread
import torch

from swarmkit.client.adapters.model_adapters import ClientAdapter, ServerAdapter
from swarmkit.client.checks.verdict import Standing
from swarmkit.client.routing.route import Hop
from swarmkit.client.session.history import History, NoHistory
from swarmkit.client.session.open_session import open_session
from swarmkit.client.session.stage_connection import StageConnection
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.client.swarm.prefix_cache import names_for
from swarmkit.errors import PeerTimeoutError, PeerUnreachableError, ProtocolError, RemoteError, SwarmkitError
from swarmkit.events import HopTrace
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import CodecName
from swarmkit.net.protocol.messages import (
    HIDDEN_DTYPES,
    MAX_ADDRESSES,
    MAX_RESTORED_PAGES,
    Link,
    Linked,
    PrefixRestored,
    RestorePrefix,
    Step,
    StepDone,
)
from swarmkit.net.rpc.message_stream import IncomingMessage

T = TypeVar("T")

_LARGE_BYTES = 1024 * 1024
"""Tensors of this size and above are copied and checked off the event loop."""
_LINK_TIMEOUT_S = 10.0
_SMALL_STEP = 16
"""To let a server compute so many tokens in vain costs less than to begin anew there."""
_MAX_TIMEOUT_S = 3600.0


@dataclass
class StepInputs:
    """What a step brings besides hidden states, for all stages alike: `rows` rows, up to position `end`."""

    position: int
    end: int
    rows: int
    mask: torch.Tensor | None
    """`[rows, end]`, uint8; None = no padding."""
    positions: torch.Tensor | None
    """`[rows, end]`, int64; None = 0, 1, …"""


@dataclass
class Request:
    """Positions [low, high) that a server is sent, and how many of the last of their outputs are wanted."""

    number: int
    low: int
    high: int
    keep: int
    rows: int
    made_at: float
    """On the client's clock."""
    answers: tuple[CodecName, ...] = ()
    """The codecs for the outputs of this server and of those that it pushes to; none = as they are."""

    @property
    def size(self) -> int:
        return self.rows * (self.high - self.low)


@dataclass
class StepResult:
    """The output `[rows, keep, hidden]` of a request, and what the server said with it."""

    output: torch.Tensor
    done: StepDone
    asked_at: float
    arrived_at: float
    """On the client's clock, as `asked_at`."""


@dataclass
class InFlight:
    """The server has the step's requests, from the client or from the previous server, and answers them."""

    requests: deque[Request]
    """Those without an answer, in order."""
    results: list[StepResult] = field(default_factory=list)


@dataclass
class Failed:
    """The server did not do the step's requests, or not all of them."""

    error: SwarmkitError
    requests: deque[Request]
    """Those without an answer, as far as one may still come."""


@dataclass(frozen=True)
class Predecessor:
    """A server that has left a session, and the history of its inputs, which another one has now."""

    hop: Hop
    inputs: History


class StageReplica:
    """One hop of a session's route: history and cache of its blocks."""

    def __init__(
        self,
        swarm: SwarmClient,
        hop: Hop,
        history: History | None = None,
        adapter: ClientAdapter | ServerAdapter | None = None,
    ) -> None:
        self._swarm = swarm
        self._adapter = adapter
        self._times = swarm.routes.times_of(hop.server)
        self._label = hop.server.label
        self.hop = hop
        self.history = history or (History() if swarm.settings.sessions.recovery else NoHistory())
        self.connection: StageConnection | None = None
        self.held = 0
        """Tokens that the server's cache holds, as far as they are still wanted."""
        self.predecessor: Predecessor | None = None
        """The server whose outputs the stages behind still hold, until this one's are compared with them."""
        self.standing = Standing()
        self.order: tuple[int, ...] | None = None
        """Reordering of rows that the server has not been told yet."""
        self.progress: InFlight | Failed | None = None
        """What became of the present step; None = the server has not got it, and is to be sent it."""
        self.max_step_tokens = 1
        self.leaving = False
        self.has_worked = False
        """Whether it did a step of this session."""
        self._inlet = ""
        """The secret with which the previous server can push into this session; "" = none can."""
        self._pushes_to = ""
        """The inlet that this server was asked to push into."""
        self._sent_bytes = 0
        self._sent_codec: CodecName = "none"

    # ------------------------------------------------------------------ the session there

    async def open(self, max_length: int) -> None:
        """Open a session at the server.

        Raises:
            PeerError: it cannot be reached, or refuses.
        """
        try:
            self.connection, opened = await self._swarm.scout.unless_outrun(
                self.hop,
                0,
                lambda: open_session(self._swarm, self.hop, self._adapter, max_length),
                self._adapter,
            )
        except BaseException:
            self.drop()
            raise
        self.max_step_tokens = opened.max_step_tokens
        self._inlet = opened.inlet

    async def restore_prefix(self, states: torch.Tensor) -> int:
        """Have the session begin with what the server has kept of these inputs `[tokens, hidden]`.

        Returns: how many tokens the server holds now.

        Raises:
            PeerError: this server failed.
        """
        connection = self._connected()
        opened = connection.opened
        if opened is None or not opened.pages or opened.dtype not in HIDDEN_DTYPES:
            return 0
        names = await off_loop(states.nbytes, lambda: names_for(opened.pages, states, opened.dtype))
        names = names[:MAX_RESTORED_PAGES]
        reply = await self._connected().ask(RestorePrefix(tuple(names)), self._swarm.policy.first_s)
        most = len(names) * PAGE_TOKENS
        if not isinstance(reply, PrefixRestored) or reply.tokens > most or reply.tokens % PAGE_TOKENS:
            raise ProtocolError("the restored prefix is not the one that was asked for", connection.peer_id)
        return reply.tokens

    async def link(self, following: StageReplica) -> bool:
        """Have the server push outputs to the next one. Returns whether it can.

        Raises:
            PeerError: this server failed.
        """
        server = following.hop.server
        if not following._inlet:
            return False
        message = Link(server.peer_id, server.addresses[:MAX_ADDRESSES], following._inlet, server.service)
        try:
            reply = await self._connected().ask(message, _LINK_TIMEOUT_S)
        except RemoteError as error:
            if error.code != "not_linked":
                raise
            return False
        if not isinstance(reply, Linked):
            raise ProtocolError("the answer to a link was none", self.hop.server.peer_id)
        self._pushes_to = following._inlet
        following.standing.pushed_by = self.hop.server.peer_id
        return True

    def is_linked_to(self, following: StageReplica) -> bool:
        """Whether the server pushes outputs into the next one's present session."""
        return bool(self._pushes_to) and self._pushes_to == following._inlet

    def unlink(self) -> None:
        """Count on no more pushes by this server."""
        self._pushes_to = ""

    def permits(self, name: CodecName) -> bool:
        """Whether the server takes and gives hidden states in that codec, as far as is known."""
        opened = None if self.connection is None else self.connection.opened
        return name == "none" or opened is None or name in opened.codecs

    @property
    def dtype(self) -> str:
        """The type that the server computes in, as far as is known."""
        return HIDDEN_DTYPES[0] if self.connection is None else self.connection.dtype

    def drop(self) -> None:
        """End the stream; the server frees its cache, and holds nothing any more."""
        if self.connection is not None:
            self.connection.close()
            if self.held:
                self._swarm.busy.has_room(self.hop.server.service_id)
        self.connection = None
        self.held = 0
        self.order = None
        self.progress = None
        self._inlet = self._pushes_to = ""

    def survives(self, error: BaseException) -> bool:
        """Whether the server still holds what it held before a failure: it had no room for just that step."""
        dismissed = self.connection is not None and self.connection.is_dismissed
        return isinstance(error, RemoteError) and error.is_busy and not dismissed

    def abandon(self) -> None:
        """The step is cancelled: have the server do no more for it than the rest of a small step."""
        unanswered = () if self.progress is None else self.progress.requests
        is_asking = self.connection is not None and self.connection.is_asking
        if is_asking or sum(request.size for request in unanswered) > _SMALL_STEP:
            self.drop()

    # ------------------------------------------------------------------ history

    def note_inputs(self, position: int, hidden: torch.Tensor, end: int) -> None:
        """Keep the inputs `[batch, tokens, hidden]` from `position` on of a step to `end`.

        They are empty where the previous server pushed them and kept nothing for the client.
        """
        if isinstance(self.history, NoHistory) and not hidden.shape[1]:
            self.history.skip_to(end)
        else:
            self.history.write(position, hidden)

    def crop(self, tokens: int) -> None:
        self.history.crop(tokens)
        self.standing.crop(tokens)
        self.held = min(self.held, tokens)

    def reorder(self, order: Sequence[int]) -> None:
        self.history.reorder(order)
        self.order = tuple(order if self.order is None else (self.order[row] for row in order))

    # ------------------------------------------------------------------ steps

    def give_up_step(self) -> None:
        """Expect no more of the step; answers that still come are dropped."""
        progress, self.progress = self.progress, None
        if progress is None or not progress.requests:
            return
        if self.order is not None:
            self.drop()  # whether the rows there are reordered already cannot be known
        if self.connection is not None:
            self.connection.give_up(request.number for request in progress.requests)

    async def send(self, request: Request, inputs: StepInputs, forward: int = 0) -> None:
        """Send the inputs of positions [low, high), from the history, and what belongs to them.

        Args: forward: over how many more servers the outputs shall be pushed on.
        """
        low, high = request.low, request.high
        connection = self._connected()
        nbytes = request.size * self._swarm.model.hidden_size * 4
        name = self.history.codec if self.permits(self.history.codec) else "none"
        spec, data = await off_loop(nbytes, lambda: self.history.encode(low, high, inputs.position, name))
        mask_spec, mask = (None, None) if inputs.mask is None else codec.encode(inputs.mask[:, :high])
        positions_spec, positions = (
            (None, None) if inputs.positions is None else codec.encode(inputs.positions[:, low:high])
        )
        timeout_s = self.timeout_s(request)
        message = Step(
            low,
            spec,
            request.keep,
            mask_spec,
            positions_spec,
            self.order if low else None,
            request.number,
            forward,
            request.answers,
            min(timeout_s, _MAX_TIMEOUT_S),
            not self._swarm.settings.sessions.recovery,
        )
        self._sent_bytes += spec.nbytes
        self._sent_codec = spec.codec
        payload = [part for part in (data, mask, positions) if part is not None]
        await connection.send(message, payload, timeout_s)

    async def take(self, request: Request, timeout_s: float, is_pushed: bool = False) -> StepResult:
        """The server's answer to a request, believed no further than it can be checked.

        Args: is_pushed: the previous server was to push the request.

        Raises:
            NotPushedError: the server could not answer because of the previous one.
            PeerError: no answer came in time, or it is wrong.
        """
        width, peer_id = self._swarm.model.hidden_size, self.hop.server.peer_id
        shape = (request.rows, request.keep, width)
        largest = request.rows * request.keep * width * 4
        try:
            connection = self._connected()
            if self._times.is_measured:
                received = await connection.receive(request.number, timeout_s, largest, is_pushed)
            else:
                received = await self._swarm.scout.unless_outrun(
                    self.hop,
                    request.size,
                    lambda: connection.receive(request.number, timeout_s, largest, is_pushed),
                    self._adapter,
                )
        except PeerTimeoutError:
            self._times.timed_out()
            raise
        except RemoteError as error:
            if error.is_busy:  # perhaps because the timeout was too short
                self._times.timed_out()
            raise
        reply = received.message
        if not isinstance(reply, StepDone):
            raise ProtocolError(f"expected StepDone, got {type(reply).__name__}", peer_id)
        if reply.hidden.codec not in ("none", *self._swarm.settings.transfer.codecs):
            raise ProtocolError(f"outputs came as {reply.hidden.codec}, which is not allowed here", peer_id)
        if reply.forwarded and not self._swarm.settings.sessions.recovery:
            shape = (request.rows, 0, width)
        output = await off_loop(largest, lambda: _checked(reply, received, shape, peer_id))
        self._note_rates(reply, self.standing.pushed_by if is_pushed else "")
        self.order = None
        self.has_worked = True
        self.leaving = reply.leaving
        return StepResult(output, reply, request.made_at, self._swarm.clock.now())

    def _note_rates(self, reply: StepDone, sender: str) -> None:
        """Note what the links to the server and from it carry."""
        rates, peer_id = self._swarm.rates, self.hop.server.peer_id
        if reply.bytes_per_s:
            rates[sender, peer_id] = reply.bytes_per_s
        if seen := self._connected().bytes_per_s:
            rates[peer_id, ""] = seen

    def timeout_s(self, request: Request) -> float:
        """Seconds after which the server has failed if it does not answer."""
        return self._times.deadline_s(request.size, self._swarm.policy)

    def observe(self, size: int, seconds: float) -> None:
        """Note how long the server took for a step of `size` rows x tokens."""
        self._times.observe(size, seconds)

    def trace(self, answers: Sequence[StepResult], seconds: float) -> HopTrace:
        """Where the time went that was waited for these answers."""
        # A server's own times are claims: they cannot be more than what passed here.
        hop, total_ms = self.hop, seconds * 1e3
        compute_ms = queue_ms = expected_ms = 0.0
        received = ahead = 0
        for answer in answers:
            done = answer.done
            compute_ms += done.compute_ms
            queue_ms += done.queue_ms
            expected_ms += done.expected_ms
            received += done.hidden.nbytes
            ahead = max(ahead, done.ahead)
        compute_ms = min(max(compute_ms, 0.0), total_ms)
        queue_ms = min(max(queue_ms, 0.0), total_ms - compute_ms)
        sent, self._sent_bytes = self._sent_bytes, 0
        return HopTrace(
            hop.server.peer_id,
            self._label,
            hop.start,
            hop.stop,
            queue_ms,
            compute_ms,
            total_ms - compute_ms - queue_ms,
            sent,
            received,
            self._sent_codec if sent else "none",
            answers[-1].done.hidden.codec,
            ahead,
            expected_ms,
        )

    def _connected(self) -> StageConnection:
        if self.connection is None:
            raise PeerUnreachableError("the stream was given up on this side", self.hop.server.peer_id)
        return self.connection


async def off_loop(nbytes: int, work: Callable[[], T]) -> T:
    """Do quick work here, and work on many bytes in a thread, so that other sessions need not wait for it."""
    return work() if nbytes < _LARGE_BYTES else await anyio.to_thread.run_sync(work)


def _checked(
    reply: StepDone, received: IncomingMessage, shape: tuple[int, int, int], peer_id: str
) -> torch.Tensor:
    """A server's output, as far as it can be seen to be one."""
    spec = reply.hidden
    if spec.shape != shape or spec.dtype not in HIDDEN_DTYPES:
        raise ProtocolError(f"outputs must be {list(shape)}, got {list(spec.shape)} of {spec.dtype}", peer_id)
    output = received.tensor(spec)
    if not codec.is_finite(output):
        raise ProtocolError("the outputs contain NaN or infinity", peer_id)
    return output
