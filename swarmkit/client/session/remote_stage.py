"""One server's part of a session: its stream, what it was sent, and what is needed to do without it."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec
import torch

from swarmkit.client.adapters.tuning import ClientAdapter, ServerAdapter
from swarmkit.client.routing.route import Hop
from swarmkit.client.session.history import History, NoHistory
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.client.swarm.prefix_cache import names_for
from swarmkit.errors import (
    PeerError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    RemoteError,
    SwarmkitError,
)
from swarmkit.events import HopTrace
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import CodecName, TensorSpec
from swarmkit.net.protocol.messages import (
    HIDDEN_DTYPES,
    MAX_ADDRESSES,
    MAX_RESTORED_PAGES,
    Fault,
    Link,
    Linked,
    Message,
    Open,
    Opened,
    PrefixRestored,
    RestorePrefix,
    Step,
    StepDone,
    Unlinked,
)
from swarmkit.net.rpc.conversation import Conversation, Received
from swarmkit.net.rpc.idle_timer import IdleTimer

T = TypeVar("T")

_LARGE_BYTES = 1024 * 1024
"""Tensors of this size and above are copied and checked off the event loop."""
_LINK_PATIENCE_S = 10.0
_SMALL_STEP = 16
"""To have a server compute so many tokens for nobody costs less than to begin anew there."""
_LAST_WORDS_S = 1.0
_MOST_PATIENCE_S = 3600.0


class NotPushedError(PeerError):
    """What a server should have got from the one before did not come, or was wrong: neither is its fault."""


@dataclass
class StepInputs:
    """What a step brings besides hidden states, for all stages alike: `rows` rows, up to position `end`."""

    position: int
    end: int
    rows: int
    mask: torch.Tensor | None
    """[rows, end], uint8; None = no padding."""
    positions: torch.Tensor | None
    """[rows, end], int64; None = 0, 1, …"""


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
    """In what the outputs of the server, and of those that it pushes to, are wanted."""

    @property
    def size(self) -> int:
        return self.rows * (self.high - self.low)


@dataclass
class StepResult:
    """The output [rows, keep, hidden] of a request, and what the server said with it."""

    output: torch.Tensor
    done: StepDone
    asked_at: float
    arrived_at: float
    """On the client's clock, as `asked_at`."""


class RemoteStage:
    """One hop of a session's route."""

    def __init__(
        self,
        swarm: SwarmClient,
        hop: Hop,
        history: History | None = None,
        tuning: ClientAdapter | ServerAdapter | None = None,
    ) -> None:
        self._swarm = swarm
        self._tuning = tuning
        self.hop = hop
        self.history = history or (History() if swarm.settings.sessions.recovery else NoHistory())
        self.held = 0
        """Tokens that the server's cache holds, as far as they are still wanted."""
        self.order: tuple[int, ...] | None = None
        """Reordering of rows that the server has not been told yet."""
        self.conversation: Conversation | None = None
        self.max_step_tokens = 1
        self.leaving = False
        self.pending: deque[Request] = deque()
        """What the server before was asked to push here, in order, and was not answered yet."""
        self.answers: list[StepResult] = []
        """Answers to such requests that were taken already."""
        self.failure: BaseException | None = None
        """Why no more of them can be taken."""
        self._inlet = ""
        self._linked_to = ""
        self._fed_by = ""
        """The server that was asked to push here."""
        self._sent_bytes = 0
        self._sent_codec: CodecName = "none"
        self._given_up: set[int] = set()
        self._asking = False
        """Whether a question without a number was not answered yet."""
        self._dismissed = False
        """Whether the server has ended the session, and said why."""
        self._patience: IdleTimer
        self._pages: Opened

    # ------------------------------------------------------------------ the session there

    async def open(self, max_length: int) -> None:
        """Open a session at the server.

        Raises:
            PeerError: it cannot be reached, or refuses.
        """
        try:
            await self._open(max_length)
        except BaseException:
            self.drop()
            raise

    async def _open(self, max_length: int) -> None:
        hop, swarm = self.hop, self._swarm
        self.conversation = await swarm.converse(hop.server)
        self._patience = IdleTimer(self.conversation)
        name, adapter = ("", None) if self._tuning is None else await self._part(self._tuning)
        message = Open(swarm.model.fingerprint, hop.start, hop.stop, max_length, name)
        message = msgspec.structs.replace(message, sent_at=self.conversation.clock())
        # To open a session computes nothing: who is silent now would be found out later, and more slowly.
        try:
            reply = await self._ask(message, swarm.connect_timeout)
        except RemoteError as error:
            if error.code != "no_adapter" or adapter is None:
                raise
            swarm.adapters.forget(hop.server, name)
            await swarm.adapters.ensure(hop.server, adapter)
            reply = await self._ask(message, swarm.connect_timeout)
        if not isinstance(reply, Opened) or reply.max_step_tokens < 1:
            raise ProtocolError("the session was not opened as asked", hop.server.peer_id)
        self.max_step_tokens = reply.max_step_tokens
        self._inlet = reply.inlet
        self._pages = reply

    async def _part(self, tuning: ClientAdapter | ServerAdapter) -> tuple[str, Adapter | None]:
        """What this server's blocks get, and its name there; a hash is taken over it at first."""
        adapter = tuning.part(self.hop.start, self.hop.stop)
        if adapter is None:
            return tuning.hosting, None
        return await anyio.to_thread.run_sync(lambda: adapter.digest), adapter

    async def recall(self, states: torch.Tensor) -> int:
        """Have the session begin with what the server has kept of these inputs [tokens, hidden].

        Returns: how many tokens the server holds now.

        Raises:
            PeerError: this server failed.
        """
        opened = self._pages
        if not opened.pages or opened.dtype not in HIDDEN_DTYPES:
            return 0
        names = await off_loop(states.nbytes, lambda: names_for(opened.pages, states, opened.dtype))
        names = names[:MAX_RESTORED_PAGES]
        reply = await self._ask(RestorePrefix(tuple(names)), self._swarm.policy.first_s)
        most = len(names) * PAGE_TOKENS
        if not isinstance(reply, PrefixRestored) or reply.tokens > most or reply.tokens % PAGE_TOKENS:
            raise ProtocolError("what was recalled is not what was asked for", self.hop.server.peer_id)
        return reply.tokens

    async def link(self, following: RemoteStage) -> bool:
        """Have the server push outputs to the next one. Returns whether it can.

        Raises:
            PeerError: this server failed.
        """
        server = following.hop.server
        if not following._inlet:
            return False
        message = Link(server.peer_id, server.addresses[:MAX_ADDRESSES], following._inlet, server.service)
        try:
            reply = await self._ask(message, _LINK_PATIENCE_S)
        except RemoteError as error:
            if error.code != "not_linked":
                raise
            return False
        if not isinstance(reply, Linked):
            raise ProtocolError("the answer to a link was none", self.hop.server.peer_id)
        self._linked_to = following._inlet
        following._fed_by = self.hop.server.peer_id
        return True

    def is_linked_to(self, following: RemoteStage) -> bool:
        """Whether the server pushes outputs into the next one's present session."""
        return bool(self._linked_to) and self._linked_to == following._inlet

    def permits(self, codec: CodecName) -> bool:
        """Whether the server takes and gives hidden states in that codec, as far as it was asked yet."""
        return codec == "none" or self.conversation is None or codec in self._pages.codecs

    @property
    def dtype(self) -> str:
        """What the server computes in, as far as it was asked yet."""
        known = self.conversation is not None and self._pages.dtype in HIDDEN_DTYPES
        return self._pages.dtype if known else HIDDEN_DTYPES[0]

    def unlink(self) -> None:
        """Count on no more pushes by this server."""
        self._linked_to = ""

    def drop(self) -> None:
        """Give the stream up; the server frees its cache, and nothing is held there any more."""
        if self.conversation is not None:
            self._patience.close()
            self.conversation.close()
        self.conversation = None
        self.held = 0
        self.order = None
        self._inlet = self._linked_to = ""
        self.pending.clear()
        self.answers.clear()
        self.failure = None
        self._given_up.clear()
        self._asking = self._dismissed = False

    def survives(self, error: BaseException) -> bool:
        """Whether the session there is as it was before what failed: the server had no room for just that."""
        return isinstance(error, RemoteError) and error.is_busy and not self._dismissed

    def abandon(self) -> None:
        """The step is cancelled: the server shall do no more for it than a token's step that has begun."""
        if self._asking or sum(request.size for request in self.pending) > _SMALL_STEP:
            self.drop()

    def note_inputs(self, position: int, hidden: torch.Tensor, end: int) -> None:
        """These are the inputs from `position` on of a step to `end`; none where it was pushed them."""
        if isinstance(self.history, NoHistory) and not hidden.shape[1]:
            self.history.skip_to(end)
        else:
            self.history.write(position, hidden)

    def crop(self, tokens: int) -> None:
        self.history.crop(tokens)
        self.held = min(self.held, tokens)

    def reorder(self, order: Sequence[int]) -> None:
        self.history.reorder(order)
        self.order = tuple(order if self.order is None else (self.order[row] for row in order))

    # ------------------------------------------------------------------ steps

    @property
    def is_pushed_to(self) -> bool:
        """Whether the answers to what was pushed here are to be taken, or taken already, or will not come.

        A long step that was cut off half-way is none of these.
        """
        if self.failure is not None:
            return True
        return bool(self.answers) != bool(self.pending) and len(self.pending) <= 1

    def expect(self, requests: Sequence[Request]) -> None:
        """The server before was asked to push these."""
        self.pending.extend(requests)

    def give_up_pending(self) -> None:
        """Expect no more pushes; answers that still come are for nobody."""
        given_up = [request.number for request in self.pending]
        self.pending.clear()
        self.answers.clear()
        self.failure = None
        if given_up and self.order is not None:
            self.drop()  # nobody knows whether the rows there are reordered already
        self._given_up.update(given_up)

    async def send(self, request: Request, inputs: StepInputs, forward: int = 0) -> None:
        """Send the inputs of positions [low, high), from the history, and what belongs to them.

        Args: forward: over how many more servers the outputs shall be pushed on.
        """
        low, high = request.low, request.high
        conversation = self._stream()
        nbytes = request.size * self._swarm.model.hidden_size * 4
        name = self.history.codec if self.permits(self.history.codec) else "none"
        spec, data = await off_loop(nbytes, lambda: self.history.encode(low, high, inputs.position, name))
        mask_spec, mask = (None, None) if inputs.mask is None else codec.encode(inputs.mask[:, :high])
        positions_spec, positions = (
            (None, None) if inputs.positions is None else codec.encode(inputs.positions[:, low:high])
        )
        order = self.order if low else None
        deadline_s = self.deadline_s(request)
        message = Step(
            low,
            spec,
            request.keep,
            mask_spec,
            positions_spec,
            order,
            request.number,
            forward,
            request.answers,
            conversation.clock(),
            min(deadline_s, _MOST_PATIENCE_S),
            not self._swarm.settings.sessions.recovery,
        )
        self._sent_bytes += spec.nbytes
        self._sent_codec = spec.codec
        payload = [part for part in (data, mask, positions) if part is not None]
        try:
            with self._patient(deadline_s):
                await conversation.send(message, payload)
        except PeerUnreachableError as error:
            raise await self._last_words(conversation) or error from None

    async def take(self, request: Request, deadline_s: float, pushed: bool = False) -> StepResult:
        """The server's answer to a request, which is believed no further than can be seen.

        Args: pushed: the request came to it from the server before, if it did.

        Raises:
            NotPushedError: it could not answer, on account of the server before.
            PeerError: none came in time, or it is wrong.
        """
        width, peer_id = self._swarm.model.hidden_size, self.hop.server.peer_id
        shape = (request.rows, request.keep, width)
        largest = request.rows * request.keep * width * 4
        try:
            received = await self._receive(request.number, deadline_s, largest, pushed)
        except PeerTimeoutError:
            self._swarm.times_of(self.hop.server).timed_out()
            raise
        except RemoteError as error:
            if error.is_busy:  # it may be so on account of too little patience
                self._swarm.times_of(self.hop.server).timed_out()
            raise
        reply = received.message
        if not isinstance(reply, StepDone):
            raise ProtocolError(f"expected StepDone, got {type(reply).__name__}", peer_id)
        if reply.hidden.codec not in ("none", *self._swarm.settings.transfer.codecs):
            raise ProtocolError(f"outputs came as {reply.hidden.codec}, which is not allowed here", peer_id)
        if reply.forwarded and not self._swarm.settings.sessions.recovery:
            shape = (request.rows, 0, width)
        output = await off_loop(largest, lambda: _checked(reply, received, shape, peer_id))
        self._note_rates(reply, self._fed_by if pushed else "")
        self.order = None
        self.leaving = reply.leaving
        return StepResult(output, reply, request.made_at, self._swarm.clock.now())

    def _note_rates(self, reply: StepDone, sender: str) -> None:
        """Note what the ways to the server and from it carry."""
        rates, peer_id = self._swarm.rates, self.hop.server.peer_id
        if reply.bytes_per_s:
            rates[sender, peer_id] = reply.bytes_per_s
        if seen := self._stream().incoming.bytes_per_s:
            rates[peer_id, ""] = seen

    def deadline_s(self, request: Request) -> float:
        """Seconds after which the server is given up if it does not answer."""
        return self._swarm.times_of(self.hop.server).deadline_s(request.size, self._swarm.policy)

    def trace(self, answers: Sequence[StepResult], seconds: float) -> HopTrace:
        """Where the time went that was waited for these answers."""
        # A server's own times are claims: they cannot be more than what passed here.
        hop, total_ms = self.hop, seconds * 1e3
        compute_ms = min(max(sum(answer.done.compute_ms for answer in answers), 0.0), total_ms)
        queue_ms = min(max(sum(answer.done.queue_ms for answer in answers), 0.0), total_ms - compute_ms)
        network_ms = total_ms - compute_ms - queue_ms
        server = hop.server
        hidden = [answer.done.hidden for answer in answers]
        sent, self._sent_bytes = self._sent_bytes, 0
        ahead = max(answer.done.ahead for answer in answers)
        expected_ms = sum(answer.done.expected_ms for answer in answers)
        return HopTrace(
            server.peer_id,
            server.label,
            hop.start,
            hop.stop,
            queue_ms,
            compute_ms,
            network_ms,
            sent,
            sum(spec.nbytes for spec in hidden),
            self._sent_codec if sent else "none",
            hidden[-1].codec,
            ahead,
            expected_ms,
        )

    # ------------------------------------------------------------------ messages

    async def _ask(self, message: Message, deadline_s: float) -> Message:
        """Send a message without tensors, and wait for the answer to it."""
        self._asking = True
        try:
            with self._patient(deadline_s):
                await self._stream().send(message)
            reply = (await self._receive(0, deadline_s, 0)).message
        except RemoteError:
            self._asking = False
            raise
        self._asking = False
        return reply

    async def _last_words(self, conversation: Conversation) -> RemoteError | None:
        """Why the server ended the stream, if it said so before."""
        with anyio.move_on_after(_LAST_WORDS_S), suppress(PeerError):
            while True:
                message = (await conversation.receive()).message
                if isinstance(message, Fault) and not message.number:
                    self._dismissed = True
                    return self._remote_error(message)
        return None

    def _remote_error(self, fault: Fault) -> RemoteError:
        return RemoteError(fault.message, self.hop.server.peer_id, fault.code, fault.retry_after_s)

    async def _receive(
        self, number: int, deadline_s: float, max_payload_bytes: int, pushed: bool = False
    ) -> Received:
        """The answer of this number; others are for requests that were given up, or wrong."""
        conversation, peer_id = self._stream(), self.hop.server.peer_id
        # An answer that nobody waits for any more may be as large as any before.
        conversation.max_payload_bytes = max(conversation.max_payload_bytes, max_payload_bytes)
        with self._patient(deadline_s):
            while True:
                received = await conversation.receive()
                message = received.message
                answered = number
                if isinstance(message, Unlinked):
                    if pushed and message.number < number:
                        raise NotPushedError("the server before hands on no more", peer_id)
                    continue
                if isinstance(message, StepDone):
                    answered = message.number
                elif isinstance(message, Fault):
                    answered = message.number or number
                if answered in self._given_up:
                    self._given_up.discard(answered)
                    continue
                if isinstance(message, Fault):
                    if pushed and message.code == "upstream":
                        raise NotPushedError(message.message, peer_id)
                    if not message.number and number:
                        self._dismissed = True  # it is not about the step
                    raise self._remote_error(message)
                if pushed and answered > number:
                    raise NotPushedError(f"request {number} was not handed on to it", peer_id)
                if answered != number:
                    raise ProtocolError(f"answer {answered} came in the place of {number}", peer_id)
                if self._given_up:  # answers come in order
                    self._given_up = {other for other in self._given_up if other > number}
                return received

    def _stream(self) -> Conversation:
        if self.conversation is None:
            raise PeerUnreachableError("the stream was given up on this side", self.hop.server.peer_id)
        return self.conversation

    @contextmanager
    def _patient(self, deadline_s: float) -> Iterator[None]:
        """Give the stream up after so many seconds."""
        self._patience.start(deadline_s)
        try:
            yield
        except PeerUnreachableError:
            if not self._patience.expired:
                raise
            raise PeerTimeoutError(f"silent for {deadline_s:.1f} s", self.hop.server.peer_id) from None
        finally:
            self._patience.stop()


async def off_loop(nbytes: int, work: Callable[[], T]) -> T:
    """Do quick work here, and work on many bytes in a thread, so that other sessions need not wait for it."""
    return work() if nbytes < _LARGE_BYTES else await anyio.to_thread.run_sync(work)


async def at_once(
    work: Mapping[RemoteStage, Callable[[], Awaitable[object]]],
) -> dict[RemoteStage, PeerError]:
    """Do something with several stages at the same time; returns how it failed, by stage."""
    errors: dict[RemoteStage, PeerError] = {}
    ours: list[SwarmkitError] = []

    async def one(stage: RemoteStage, act: Callable[[], Awaitable[object]]) -> None:
        try:
            await act()
        except PeerError as error:
            errors[stage] = error
        except SwarmkitError as error:
            ours.append(error)

    async with anyio.create_task_group() as tasks:
        for stage, act in work.items():
            tasks.start_soon(one, stage, act)
    if ours:
        raise ours[0]
    return errors


def _checked(reply: StepDone, received: Received, shape: tuple[int, int, int], peer_id: str) -> torch.Tensor:
    """A server's output, as far as it can be seen to be one."""
    spec: TensorSpec = reply.hidden
    if spec.shape != shape or spec.dtype not in HIDDEN_DTYPES:
        raise ProtocolError(f"outputs must be {list(shape)}, got {list(spec.shape)} of {spec.dtype}", peer_id)
    output = received.tensor(spec)
    if not codec.is_finite(output):
        raise ProtocolError("the outputs contain NaN or infinity", peer_id)
    return output
