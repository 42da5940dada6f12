"""The protocol's server half: one client per stream, one session per stream.

Everything in a message is checked before it touches a cache; what is refused is refused with a `Fault` that
names what was wrong, and changes nothing. Whatever ends a stream ends its session and returns its lease.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import anyio
import torch

from swarmkit.errors import IllegalMessageError, PeerError, ProtocolError, SwarmkitError
from swarmkit.models.stage import Stage, StageCache
from swarmkit.net import codec
from swarmkit.net.codec import TensorSpec
from swarmkit.net.conversation import Conversation, Received
from swarmkit.net.messages import (
    FATAL,
    AskInfo,
    Fault,
    FaultCode,
    Info,
    Open,
    Opened,
    State,
    Step,
    StepDone,
    next_state,
)
from swarmkit.net.transport import Stream
from swarmkit.server.engine import Engine, Timed
from swarmkit.server.kv_budget import CacheFullError, KVBudget, Lease
from swarmkit.settings import ServerSettings

logger = logging.getLogger(__name__)

_HIDDEN_DTYPES = ("float32", "bfloat16", "float16")
_MAX_POSITION = 2**24
# A step may also bring a mask over all its past, and positions: small beside hidden states, but bounded too.
_SIDE_BYTES = 16 * 1024 * 1024


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


class BlockService:
    """Serves a stage's blocks to any number of clients."""

    def __init__(
        self, stage: Stage, fingerprint: str, kv_bytes_per_token_per_block: int, engine: Engine, settings: ServerSettings
    ) -> None:
        self._stage = stage
        self._fingerprint = fingerprint
        self._kv_bytes = kv_bytes_per_token_per_block
        self._engine = engine
        self._settings = settings
        self._sessions: set[_Session] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.budget = KVBudget(settings.cache_bytes)
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
            return True
        return False

    def stop_waiting(self) -> None:
        """End a `drain` that is under way."""
        self._idle.set()

    async def serve(self, stream: Stream) -> None:
        """One stream's life. Never raises on account of the peer."""
        conversation = Conversation(stream, self.max_payload_bytes, self._settings.message_timeout)
        state: State = "new"
        session: _Session | None = None
        try:
            while True:
                try:
                    received = await self._receive(conversation)
                    following = next_state(state, received.message)
                    session = await self._answer(conversation, session, received)
                    state = following
                except IllegalMessageError as error:
                    await self._refuse(conversation, Refusal("illegal_message", str(error)))
                    return
                except ProtocolError as error:
                    await self._refuse(conversation, Refusal("bad_message", str(error)))
                    return
                except Refusal as refusal:
                    await self._refuse(conversation, refusal)
                    if refusal.code in FATAL:
                        return
        except (PeerError, TimeoutError) as error:
            logger.debug("stream of %s ended: %s", conversation.peer_id[-6:], error)
        finally:
            if session is not None:
                self._end(session)
            conversation.close()

    async def _receive(self, conversation: Conversation) -> Received:
        with anyio.fail_after(self._settings.idle_timeout):
            return await conversation.receive()

    async def _refuse(self, conversation: Conversation, refusal: Refusal) -> None:
        logger.info("refused %s: %s (%s)", conversation.peer_id[-6:], refusal, refusal.code)
        fault = Fault(refusal.code, str(refusal)[:2000])
        with anyio.fail_after(self._settings.message_timeout):
            await conversation.send(fault)

    async def _answer(
        self, conversation: Conversation, session: _Session | None, received: Received
    ) -> _Session | None:
        message = received.message
        match message:
            case Open():
                session = self._open(message)
                try:
                    await conversation.send(Opened(self._settings.max_step_tokens))
                except BaseException:
                    self._end(session)
                    raise
            case AskInfo():
                await conversation.send(self._info())
            case Step():
                assert session is not None  # the conversation's table lets no step through without a session
                reply, payload = await self._step(session, message, received)
                with anyio.fail_after(self._settings.message_timeout):
                    await conversation.send(reply, [payload])
        return session

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
            raise Refusal("too_long", f"a session may hold 1 to {self._settings.max_session_length} tokens a row")
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

    def _end(self, session: _Session) -> None:
        self._sessions.discard(session)
        session.lease.release()
        if not self._sessions:
            self._idle.set()

    def _bytes_per_token(self, start: int, stop: int) -> int:
        return max(1, (stop - start) * self._kv_bytes)

    # ------------------------------------------------------------------ steps

    async def _step(self, session: _Session, step: Step, received: Received) -> tuple[StepDone, memoryview]:
        self._check_shapes(session, step)
        rows, tokens, _ = step.hidden.shape
        try:
            session.lease.grow(rows, step.position + tokens)
        except CacheFullError as error:
            raise Refusal("busy", f"{error}; try another server") from None
        try:
            timed = await self._engine.run(lambda: self._compute(session, step, received))
        except SwarmkitError:
            raise
        except Exception as error:
            logger.exception("a step failed on this server")
            raise Refusal("internal", f"the step failed on the server: {type(error).__name__}: {error}") from error
        finally:
            # An edit may have shortened the cache, and a refused step has not lengthened it.
            session.lease.resize(session.cache.batch, session.cache.tokens)
        self.steps += 1
        return self._done(timed)

    def _done(self, timed: Timed[tuple[TensorSpec, memoryview]]) -> tuple[StepDone, memoryview]:
        spec, payload = timed.value
        return StepDone(spec, timed.queue_s * 1e3, timed.compute_s * 1e3, self.leaving), payload

    def _check_shapes(self, session: _Session, step: Step) -> None:
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
                "out_of_order", f"position {step.position} is beyond the {cache.tokens} tokens this session holds"
            )
        if step.position + tokens > session.max_length:
            raise Refusal(
                "too_long",
                f"{step.position} + {tokens} tokens are more than the {session.max_length} this session declared",
            )
        if step.keep > tokens:
            raise Refusal("bad_shape", f"{step.keep} outputs were asked for, but the step has {tokens} tokens")
        expected_rows = cache.batch
        if step.order is not None:
            if step.position and any(row >= cache.batch for row in step.order):
                raise Refusal("bad_value", f"order names rows outside the {cache.batch} that this session holds")
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
        if not bool(torch.isfinite(hidden).all()):
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
