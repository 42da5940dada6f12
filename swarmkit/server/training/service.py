"""The training half of the protocol: requests that bring all they need, and leave nothing to rely on.

They are run as bulk jobs, a slice at a time, between which the engine runs whatever is more urgent. Requests
of one client are run in the order in which they came, one after the other, those of different clients by
turns: a client that sends its micro-batches ahead gets the first one back first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field

from swarmkit.models.execution.stage import Stage
from swarmkit.net.protocol.gradient_messages import (
    GRADIENT,
    Backward,
    BackwardDone,
    ForwardDone,
    GetCodecs,
    GradientRequest,
    TakenCodecs,
    Working,
)
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.rpc.stream_shares import StreamShares
from swarmkit.net.transport.seam import Stream
from swarmkit.server.adapters.service import check_rows, held
from swarmkit.server.adapters.store import AdapterStore
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.work import BULK
from swarmkit.server.quota import ClientQuota
from swarmkit.server.training.activation_cache import ActivationCache
from swarmkit.server.training.work import STATES_FACTOR, GradientWork, SliceTimes, check_request
from swarmkit.settings import ServerSettings

logger = logging.getLogger(__name__)

_SIDE_BYTES = 16 * 1024 * 1024
"""For masks and positions: small beside hidden states, but bounded too."""
_TELL_EVERY_S = 1.0
_RECEIVED_AHEAD = 4
"""Requests of one client that are received or run at a time. The others wait on their way: to receive
hundreds of megabytes at once would hold up everybody else's messages.
"""


@dataclass
class _Turn:
    """One client's requests: the lock that one of them holds, those that are received, and how many there
    are.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    received: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_RECEIVED_AHEAD))
    requests: int = 0


class GradientService:
    """Serves a stage's blocks for training to any number of clients."""

    def __init__(
        self,
        stage: Stage,
        fingerprint: str,
        engine: Engine,
        settings: ServerSettings,
        receive_budget: ReceiveBudget,
        leaving: Callable[[], bool] = lambda: False,
        adapters: AdapterStore | None = None,
        quota: ClientQuota | None = None,
    ) -> None:
        """Args:
        receive_budget: memory for large messages, which sessions use as well.
        adapters: those that requests may name; none if not given.
        leaving: whether the server is about to stop.
        quota: limits what each client may have computed.
        """
        self._stage = stage
        self._fingerprint = fingerprint
        self._engine = engine
        self._settings = settings
        self._receive_budget = receive_budget
        self._leaving = leaving
        self._quota = ClientQuota(engine.clock.now) if quota is None else quota
        self._adapters = AdapterStore(0, 0) if adapters is None else adapters
        self._times = SliceTimes(settings.training.gradient_slice_s)
        self._turns: dict[str, _Turn] = {}
        self.kept = ActivationCache(settings.limits.activation_cache_bytes, clock=engine.clock.now)
        """Activations of forward passes; the owner of this service calls `drop_old` now and then."""
        self.streams = StreamShares(settings.training.max_gradient_streams)
        self.requests = 0
        """That were answered with a result."""
        largest = settings.requests.max_step_tokens * stage.hidden_size * 4
        self.max_payload_bytes = (1 + STATES_FACTOR) * largest + _SIDE_BYTES

    @property
    def waiting(self) -> int:
        """Requests that run or wait for their turn."""
        return sum(turn.requests for turn in self._turns.values())

    async def serve(self, stream: Stream) -> None:
        """Serve one stream until it ends. Never raises on account of the peer."""
        caller = ServerStream(
            stream,
            GRADIENT,
            max_payload_bytes=self.max_payload_bytes,
            message_timeout=self._settings.requests.message_timeout_s,
            clock=self._engine.clock.now,
        )
        with self.streams.counted(caller) as refusal:
            await caller.serve(lambda incoming: self._answer(caller, incoming), refusal)

    async def _answer(self, caller: ServerStream, incoming: IncomingMessage) -> None:
        settings = self._settings
        if isinstance(incoming.message, GetCodecs):
            await caller.send(TakenCodecs(settings.sessions.codecs))
            return
        request: GradientRequest = incoming.message
        if self._leaving():
            raise Refusal("leaving", "this server is about to stop; use another one")
        check_request(
            request,
            self._stage,
            self._fingerprint,
            settings.requests.max_step_tokens,
            settings.sessions.codecs,
        )
        self._quota.take(caller.peer_id, request.hidden.shape[0] * request.hidden.shape[1])
        hold = held(self._adapters, request.adapter, request.start, request.stop)
        with hold or nullcontext():
            check_rows(hold, request.hidden.shape[0])
            async with self._turn(caller.peer_id) as turn, turn.received:
                with self._reservation(caller) as room:
                    try:
                        await room.take(incoming.nbytes, settings.requests.message_timeout_s)
                    except TimeoutError:
                        reason = "too many large requests are under way; try another server"
                        raise Refusal("busy", reason) from None
                    await incoming.payload()
                    work = GradientWork(
                        self._stage,
                        request,
                        incoming,
                        self._times,
                        settings.engine.prefill_chunk_tokens,
                        None if hold is None else hold.adapter,
                        caller.peer_id,
                        self.kept,
                        self._engine.clock.now,
                    )
                    await self._do(caller, request, work, turn)

    def _reservation(self, caller: ServerStream) -> ReceiveReservation:
        return ReceiveReservation(self._receive_budget, caller.holder, caller.dismiss)

    async def _do(
        self, caller: ServerStream, request: GradientRequest, work: GradientWork, turn: _Turn
    ) -> None:
        """Run a request when the client's turn comes, and send its result."""
        arrived = self._engine.clock.now()
        async with turn.lock:
            compute_s = await self._run(caller, work)
            spec, payload = work.result()
            of_adapter = work.adapter_gradient()
        spent_s = self._engine.clock.now() - arrived
        self.requests += 1
        times_ms = max(spent_s - compute_s, 0.0) * 1e3, compute_s * 1e3
        rate = caller.speed.bytes_per_s or 0.0
        if not isinstance(request, Backward):
            await caller.send(ForwardDone(spec, *times_ms, rate), [payload])
        elif of_adapter is None:
            await caller.send(BackwardDone(spec, *times_ms, None, rate), [payload])
        else:
            await caller.send(BackwardDone(spec, *times_ms, of_adapter[0], rate), [payload, of_adapter[1]])

    async def _run(self, caller: ServerStream, work: GradientWork) -> float:
        """Run slice after slice; returns the seconds that the device took for them."""
        compute_s = 0.0
        told_at = self._engine.clock.now()
        while work.left:
            compute_s += (await self._engine.run(work.advance, BULK)).compute_s
            if work.left and self._engine.clock.now() - told_at > _TELL_EVERY_S:
                # Which also shows whether the client is still there.
                await caller.send(Working(work.done, work.total))
                told_at = self._engine.clock.now()
        return compute_s

    @asynccontextmanager
    async def _turn(self, peer_id: str) -> AsyncIterator[_Turn]:
        """One client's requests, of which this is one."""
        turn = self._turns.setdefault(peer_id, _Turn())
        turn.requests += 1
        try:
            yield turn
        finally:
            turn.requests -= 1
            if not turn.requests:
                del self._turns[peer_id]
