"""Serves the model's output layer: hidden states come, and the largest logits go.

Requests that wait at the same time are multiplied together: to read the weights is what takes long, and they
are read once for all of them. Nothing of a request is kept.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from swarmkit.ewma import Ewma
from swarmkit.models.head.output_layer import OutputLayer, TopLogits, top_logits
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.logits_messages import LOGITS, MAX_LOGITS_ROWS, GetLogits, Logits
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.receive_budget import ReceiveBudget, ReceiveReservation
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.rpc.stream_shares import StreamShares
from swarmkit.net.transport.seam import Stream
from swarmkit.server.engine.engine import Engine
from swarmkit.server.quota import ClientQuota
from swarmkit.settings import ServerSettings

_MAX_STREAMS = 256
_GAIN = 0.1
_MEASURED_PASSES = 3


class _Rows:
    """Rows of one client that wait for the output layer."""

    def __init__(self, hidden: Tensor, top: int, temperature: float) -> None:
        self.hidden = hidden
        self.top = top
        self.temperature = temperature
        self.result: TopLogits | None = None


class HeadService:
    """Serves an output layer to any number of clients."""

    def __init__(
        self,
        layer: OutputLayer,
        fingerprint: str,
        engine: Engine,
        settings: ServerSettings,
        receive_budget: ReceiveBudget,
        leaving: Callable[[], bool] = lambda: False,
        quota: ClientQuota | None = None,
    ) -> None:
        """Args:
        receive_budget: memory for large messages; large answers count until they are sent.
        leaving: whether the server is about to stop, so that clients shall use another one.
        """
        self.layer = layer
        """What computes the logits."""
        self._fingerprint = fingerprint
        self._engine = engine
        self._settings = settings
        self._receive_budget = receive_budget
        self._leaving = leaving
        self._quota = quota
        self._streams = StreamShares(_MAX_STREAMS)
        self._lock = threading.Lock()
        self._waiting: deque[_Rows] = deque()
        self._seconds: Ewma | None = None
        self.requests = 0
        """How many were answered."""

    @property
    def row_ms(self) -> float:
        """How long one row takes, in milliseconds, as measured; 0 before that."""
        return 0.0 if self._seconds is None else self._seconds.mean * 1e3

    async def measure(self) -> None:
        """Measure how long one row takes."""
        hidden = torch.zeros(1, self.layer.hidden_size)

        def one_row() -> None:
            top_logits(self.layer(hidden), 1, 1.0).values.cpu()

        passes = [(await self._engine.run(one_row)).compute_s for _ in range(_MEASURED_PASSES)]
        self._seconds = Ewma(min(passes), 0.0, _GAIN)  # the first one has read the weights from disk

    async def serve(self, stream: Stream) -> None:
        """Serve one stream until it ends. Never raises on account of the peer."""
        requests = self._settings.requests
        caller = ServerStream(
            stream,
            LOGITS,
            max_payload_bytes=MAX_LOGITS_ROWS * self.layer.hidden_size * torch.float32.itemsize,
            message_timeout=requests.message_timeout_s,
            clock=self._engine.clock.now,
        )
        caller.idle_s = requests.idle_timeout_s
        with self._streams.counted(caller) as refusal:
            await caller.serve(lambda incoming: self._answer(caller, incoming), refusal)

    async def _answer(self, caller: ServerStream, incoming: IncomingMessage) -> None:
        message: GetLogits = incoming.message
        self._check(message)
        rows = message.hidden.shape[0]
        if self._quota is not None:
            self._quota.take(caller.peer_id, rows)
        room = ReceiveReservation(self._receive_budget, caller.holder, caller.dismiss)
        with room:
            try:
                await room.take(self._nbytes(message), self._settings.requests.max_admission_wait_s)
            except TimeoutError:
                raise Refusal("busy", "too many large messages are under way; try another server") from None
            await incoming.payload()
            hidden = incoming.tensor(message.hidden)
            if not codec.is_finite(hidden):
                raise Refusal("not_finite", "the hidden states contain NaN or infinity")
            reply, payload = await self.reply(_Rows(hidden, message.top, message.temperature))
            self.requests += 1
            await caller.send(reply, payload)

    def _nbytes(self, message: GetLogits) -> int:
        """The bytes of a request and of its answer."""
        top, item = message.top, torch.float32.itemsize
        answer = top * (item + torch.int64.itemsize) if top else self.layer.vocabulary * item
        return message.hidden.nbytes + message.hidden.shape[0] * (answer + item)

    @property
    def waiting(self) -> int:
        """How many requests wait for the output layer."""
        return len(self._waiting)

    async def reply(self, request: _Rows) -> tuple[Logits, list[memoryview]]:
        """Have a request computed; returns the answer, and what follows it."""
        with self._lock:
            self._waiting.append(request)
        try:
            timed = await self._engine.run(lambda: self._run(request))
        finally:
            self._withdraw(request)
        result = request.result
        assert result is not None
        values, values_data = codec.encode(result.values)
        total, total_data = codec.encode(result.log_sum_exp)
        tokens, payload = None, [values_data, total_data]
        if result.tokens is not None:
            tokens, tokens_data = codec.encode(result.tokens)
            payload.append(tokens_data)
        return Logits(values, total, tokens, timed.queue_s * 1e3, timed.compute_s * 1e3), payload

    def _check(self, message: GetLogits) -> None:
        if message.fingerprint != self._fingerprint:
            raise Refusal(
                "wrong_model",
                f"the logits are of the model {message.fingerprint}, this server serves {self._fingerprint}",
            )
        if self._leaving():
            raise Refusal("leaving", "this server is about to stop; use another one")
        spec, width = message.hidden, self.layer.hidden_size
        if len(spec.shape) != 2 or spec.shape[1] != width or not 1 <= spec.shape[0] <= MAX_LOGITS_ROWS:
            raise Refusal(
                "bad_shape",
                f"hidden states are [1 to {MAX_LOGITS_ROWS}, {width}] here, got {list(spec.shape)}",
            )
        if spec.dtype != "float32" or spec.codec != "none":
            raise Refusal("bad_dtype", f"hidden states are float32 here, got {spec.dtype} as {spec.codec}")

    # ------------------------------------------------------------------ on the engine's thread

    def _run(self, request: _Rows) -> None:
        """Compute a request, with others that wait, unless it was computed with an earlier one."""
        while request.result is None:
            batch = self._next_batch()
            if not batch:
                return  # it was withdrawn
            began_at = self._engine.clock.now()
            logits = self.layer(torch.cat([one.hidden for one in batch]))
            for one, rows in zip(batch, logits.split([len(one.hidden) for one in batch]), strict=True):
                found = top_logits(rows, one.top, one.temperature)
                tokens = None if found.tokens is None else found.tokens.cpu()
                one.result = TopLogits(found.values.cpu(), tokens, found.log_sum_exp.cpu())
            if len(logits) == 1 and self._seconds is not None:
                self._seconds.observe(self._engine.clock.now() - began_at)

    def _next_batch(self) -> list[_Rows]:
        """The requests that have waited longest, as many as are computed together."""
        batch: list[_Rows] = []
        rows = 0
        with self._lock:
            while self._waiting and (not batch or rows + len(self._waiting[0].hidden) <= MAX_LOGITS_ROWS):
                request = self._waiting.popleft()
                batch.append(request)
                rows += len(request.hidden)
        return batch

    def _withdraw(self, request: _Rows) -> None:
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)
