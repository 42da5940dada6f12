"""The protocol's server half: one client per stream, one session per stream.

Everything in a message is checked before it touches a cache; what is refused is refused with a `Fault` that
names what was wrong, and changes nothing. Whatever ends a stream ends its session and returns its lease.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import anyio

from swarmkit.errors import (
    IllegalMessageError,
    MessageTooLargeError,
    PeerError,
    ProtocolError,
    SwarmkitError,
)
from swarmkit.models.stage import Stage, StageCache
from swarmkit.net import codec
from swarmkit.net.codec import TensorSpec
from swarmkit.net.conversation import CHUNK_BYTES, Conversation, Received
from swarmkit.net.messages import (
    FATAL,
    AskInfo,
    Fault,
    FaultCode,
    Info,
    Message,
    Open,
    Opened,
    State,
    Step,
    StepDone,
    next_state,
    printable,
    tensor_specs,
)
from swarmkit.net.patience import Patience
from swarmkit.net.transport import Buffer, Stream
from swarmkit.server.engine import Engine, EngineClosedError, Timed
from swarmkit.server.intake import Intake
from swarmkit.server.kv_budget import CacheFullError, KVBudget, Lease
from swarmkit.settings import ServerSettings

logger = logging.getLogger(__name__)

_HIDDEN_DTYPES = ("float32", "bfloat16", "float16")
_MAX_POSITION = 2**24
# A step may also bring a mask over all its past, and positions: small beside hidden states, but bounded too.
_SIDE_BYTES = 16 * 1024 * 1024
# Streams beyond the number of sessions, for those who only ask, or must be told that the server is full.
_SPARE_STREAMS = 64
_LINGER_S = 1.0


class Refusal(SwarmkitError):
    """A request that is answered with a fault instead of a result."""

    def __init__(self, code: FaultCode, message: str) -> None:
        super().__init__(message)
        self.code: FaultCode = code


@dataclass(eq=False)
class _Session:
    """One client's cache on this server."""

    start: int
    stop: int
    max_length: int
    cache: StageCache
    lease: Lease


@dataclass(eq=False)
class _Client:
    """The other end of one stream."""

    conversation: Conversation
    state: State = "new"
    session: _Session | None = None
    taken_bytes: int = field(default=0)
    """What its present message holds of the intake."""

    def __post_init__(self) -> None:
        self.patience = Patience(self.conversation)


class BlockService:
    """Serves a stage's blocks to any number of clients."""

    def __init__(
        self,
        stage: Stage,
        fingerprint: str,
        kv_bytes_per_token_per_block: int,
        engine: Engine,
        settings: ServerSettings,
    ) -> None:
        self._stage = stage
        self._fingerprint = fingerprint
        self._kv_bytes = kv_bytes_per_token_per_block
        self._engine = engine
        self._settings = settings
        self._sessions: set[_Session] = set()
        self._streams = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.budget = KVBudget(settings.cache_bytes)
        self.intake = Intake(settings.incoming_bytes)
        self.leaving = False
        self.steps = 0
        self.max_payload_bytes = settings.max_step_tokens * stage.hidden_size * 4 + _SIDE_BYTES

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def free_cache_tokens(self) -> int:
        """Tokens of one row that still fit, if a session uses all blocks of the stage."""
        return self.budget.free_bytes // self._bytes_per_token(self._stage.start, self._stage.stop)

    @property
    def total_cache_tokens(self) -> int:
        return self.budget.capacity_bytes // self._bytes_per_token(self._stage.start, self._stage.stop)

    async def drain(self, timeout: float) -> bool:
        """Take no new sessions, tell the others to move, wait until they have. Returns whether all did."""
        self.leaving = True
        with anyio.move_on_after(timeout):
            await self._idle.wait()
        return not self._sessions

    def stop_waiting(self) -> None:
        """End a `drain` that is under way."""
        self._idle.set()

    # ------------------------------------------------------------------ one stream

    async def serve(self, stream: Stream) -> None:
        """One stream's life. Never raises on account of the peer."""
        client = _Client(Conversation(stream, self.max_payload_bytes, self._settings.message_timeout))
        self._streams += 1
        try:
            if self._streams > self._settings.max_sessions + _SPARE_STREAMS:
                await self._refuse(client, Refusal("busy", "too many streams are open; try another server"))
            else:
                while await self._serve_next(client):
                    pass
            self._end(client)
            await self._linger(client)
        except (PeerError, TimeoutError) as error:
            logger.debug("stream of %s ended: %s", stream.peer_id[-6:], error)
        finally:
            self._streams -= 1
            self._end(client)
            client.patience.close()
            client.conversation.close()

    async def _serve_next(self, client: _Client) -> bool:
        """One message and the answer to it. Returns whether the conversation can go on."""
        try:
            received = await self._receive(client)
            await self._answer(client, received)
            return True
        except IllegalMessageError as error:
            refusal, goes_on = Refusal("illegal_message", str(error)), False
        except MessageTooLargeError as error:
            refusal, goes_on = Refusal("too_large", str(error)), False
        except ProtocolError as error:
            refusal, goes_on = Refusal("bad_message", str(error)), False
        except Refusal as error:
            refusal, goes_on = error, error.code not in FATAL
        finally:
            self.intake.give_back(client.taken_bytes)
            client.taken_bytes = 0
        await self._refuse(client, refusal)
        return goes_on

    async def _receive(self, client: _Client) -> Received:
        # Whoever opens a stream has something to say; only a session may be silent for long.
        settings = self._settings
        timeout = settings.message_timeout if client.session is None else settings.idle_timeout
        client.patience.start(timeout)
        try:
            return await client.conversation.receive(lambda message: self._admit(client, message))
        finally:
            client.patience.stop()

    async def _admit(self, client: _Client, message: Message) -> None:
        """All that the header alone can tell, before memory is spent on the payload."""
        next_state(client.state, message)
        if isinstance(message, Step):
            assert client.session is not None  # the conversation's table lets no step through without one
            self._check_step(client.session, message)
            nbytes = sum(spec.nbytes for spec in tensor_specs(message))
            if nbytes > CHUNK_BYTES:
                await self._take(client, nbytes)

    async def _take(self, client: _Client, nbytes: int) -> None:
        try:
            with anyio.fail_after(self._settings.message_timeout):
                await self.intake.take(nbytes)
        except TimeoutError:
            raise Refusal("busy", "too many large steps are under way; try another server") from None
        client.taken_bytes = nbytes

    async def _answer(self, client: _Client, received: Received) -> None:
        message = received.message
        match message:
            case Open():
                client.session = self._open(message)
                await self._send(client, Opened(self._settings.max_step_tokens))
            case AskInfo():
                await self._send(client, self._info())
            case Step():
                assert client.session is not None
                reply, payload = await self._step(client.session, message, received)
                await self._send(client, reply, payload)
        client.state = next_state(client.state, message)

    async def _send(self, client: _Client, message: Message, *payload: Buffer) -> None:
        """Answer; a client that does not take its answer in time loses its stream."""
        client.patience.start(self._settings.message_timeout)
        try:
            await client.conversation.send(message, payload)
        finally:
            client.patience.stop()

    async def _refuse(self, client: _Client, refusal: Refusal) -> None:
        text = printable(str(refusal))[:2000]  # it may quote what the peer sent
        logger.info("refused %s: %s (%s)", client.conversation.peer_id[-6:], text, refusal.code)
        await self._send(client, Fault(refusal.code, text))

    async def _linger(self, client: _Client) -> None:
        """Let the peer read why the stream ends: closing while it still sends could discard that."""
        with anyio.move_on_after(_LINGER_S):
            while True:
                await client.conversation.stream.receive()

    def _info(self) -> Info:
        return Info(
            start=self._stage.start,
            stop=self._stage.stop,
            sessions=len(self._sessions),
            cache_tokens_free=self.free_cache_tokens,
            cache_tokens_total=self.total_cache_tokens,
            steps=self.steps,
            leaving=self.leaving,
        )

    # ------------------------------------------------------------------ sessions

    def _open(self, message: Open) -> _Session:
        if self.leaving:
            raise Refusal("leaving", "this server is about to stop; use another one")
        if message.fingerprint != self._fingerprint:
            raise Refusal(
                "wrong_model",
                f"this server serves the model {self._fingerprint}, not {message.fingerprint}; "
                "load the same checkpoint, or ask servers of yours",
            )
        stage = self._stage
        if not stage.start <= message.start < message.stop <= stage.stop:
            raise Refusal(
                "blocks_not_held",
                f"blocks {message.start}:{message.stop} are not inside the served {stage.start}:{stage.stop}",
            )
        if not 1 <= message.max_length <= self._settings.max_session_length:
            raise Refusal(
                "too_long", f"a session may hold 1 to {self._settings.max_session_length} tokens a row"
            )
        if len(self._sessions) >= self._settings.max_sessions:
            raise Refusal("busy", f"{len(self._sessions)} sessions are open already; try another server")
        session = _Session(
            message.start,
            message.stop,
            message.max_length,
            stage.new_cache(message.start, message.stop),
            self.budget.lease(self._bytes_per_token(message.start, message.stop)),
        )
        self._sessions.add(session)
        self._idle.clear()
        return session

    def _end(self, client: _Client) -> None:
        if client.session is not None:
            self._sessions.discard(client.session)
            client.session.lease.release()
            client.session = None
        if not self._sessions:
            self._idle.set()

    def _bytes_per_token(self, start: int, stop: int) -> int:
        return max(1, (stop - start) * self._kv_bytes)

    # ------------------------------------------------------------------ steps

    async def _step(self, session: _Session, step: Step, received: Received) -> tuple[StepDone, memoryview]:
        rows, tokens, _ = step.hidden.shape
        try:
            session.lease.grow(rows, step.position + tokens)
        except CacheFullError as error:
            raise Refusal("busy", f"{error}; try another server") from None
        try:
            timed = await self._engine.run(lambda: self._compute(session, step, received))
        except Refusal:
            raise
        except EngineClosedError:
            raise Refusal("leaving", "this server has stopped computing; use another one") from None
        except Exception as error:
            logger.exception("a step failed on this server")
            raise Refusal(
                "internal", f"the step failed on the server: {type(error).__name__}: {error}"
            ) from error
        finally:
            # An edit may have shortened the cache, and a refused step has not lengthened it.
            session.lease.resize(session.cache.batch, session.cache.tokens)
        self.steps += 1
        return self._done(timed)

    def _done(self, timed: Timed[tuple[TensorSpec, memoryview]]) -> tuple[StepDone, memoryview]:
        spec, payload = timed.value
        return StepDone(spec, timed.queue_s * 1e3, timed.compute_s * 1e3, self.leaving), payload

    def _check_step(self, session: _Session, step: Step) -> None:
        """Everything that the header alone can tell, against what the session holds."""
        hidden, cache = step.hidden, session.cache
        if len(hidden.shape) != 3 or hidden.shape[2] != self._stage.hidden_size or 0 in hidden.shape:
            raise Refusal(
                "bad_shape",
                f"hidden states must be [batch, tokens, {self._stage.hidden_size}], got {list(hidden.shape)}",
            )
        if hidden.dtype not in _HIDDEN_DTYPES:
            raise Refusal("bad_dtype", f"hidden states must be one of {_HIDDEN_DTYPES}, not {hidden.dtype}")
        rows, tokens, _ = hidden.shape
        if rows * tokens > self._settings.max_step_tokens:
            raise Refusal(
                "too_large",
                f"{rows} x {tokens} tokens are more than the {self._settings.max_step_tokens} of one step; "
                "send them in pieces",
            )
        if step.position > cache.tokens:
            raise Refusal(
                "out_of_order",
                f"position {step.position} is beyond the {cache.tokens} tokens this session holds",
            )
        if step.position + tokens > session.max_length:
            raise Refusal(
                "too_long",
                f"{step.position} + {tokens} tokens are more than the {session.max_length} "
                "that this session declared",
            )
        if step.keep > tokens:
            raise Refusal(
                "bad_shape", f"{step.keep} outputs were asked for, but the step has {tokens} tokens"
            )
        expected_rows = cache.batch
        if step.order is not None:
            if step.position and (not step.order or max(step.order) >= cache.batch):
                raise Refusal(
                    "bad_value",
                    f"order must name some of the {cache.batch} rows that this session holds, and no others",
                )
            expected_rows = len(step.order)
        if step.position and rows != expected_rows:
            raise Refusal("bad_shape", f"the step has {rows} rows, the session {expected_rows}")
        self._check_side(step.mask, "mask", "uint8", (rows, step.position + tokens))
        self._check_side(step.positions, "positions", "int64", (rows, tokens))

    def _check_side(self, spec: TensorSpec | None, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        if spec is None:
            return
        if spec.shape != shape:
            raise Refusal("bad_shape", f"{name} must be {list(shape)}, got {list(spec.shape)}")
        if spec.dtype != dtype or spec.codec != "none":
            raise Refusal("bad_dtype", f"{name} must be plain {dtype}, not {spec.dtype} as {spec.codec}")

    def _compute(self, session: _Session, step: Step, received: Received) -> tuple[TensorSpec, memoryview]:
        """On the engine's thread: decode, check values, edit the cache, run, encode."""
        hidden = received.tensor(step.hidden)
        if not codec.is_finite(hidden):
            raise Refusal("not_finite", "the hidden states contain NaN or infinity")
        mask = received.tensor(step.mask) if step.mask is not None else None
        if mask is not None and bool((mask > 1).any()):
            raise Refusal("bad_value", "a mask may contain 0 and 1 only")
        positions = received.tensor(step.positions) if step.positions is not None else None
        if positions is not None and bool(((positions < 0) | (positions >= _MAX_POSITION)).any()):
            raise Refusal("bad_value", f"position ids must be in 0..{_MAX_POSITION - 1}")
        stage, cache = self._stage, session.cache
        if step.position == 0:
            cache.clear()
        else:
            cache.edit(step.position, step.order)
        output = stage.forward(
            hidden.to(device=stage.device, dtype=stage.dtype),
            cache,
            attention_mask=None if mask is None else mask.to(stage.device),
            position_ids=None if positions is None else positions.to(stage.device),
        )
        return codec.encode(output[:, output.shape[1] - step.keep :])
