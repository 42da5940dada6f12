"""One request for training to one server, and its answer, which is believed no further than can be seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch

from swarmkit.client.gradients.flows import PassRequest
from swarmkit.client.session.replica import off_loop
from swarmkit.errors import ProtocolError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import CodecName, TensorSpec
from swarmkit.net.protocol.gradient_messages import (
    Backward,
    BackwardDone,
    Forward,
    ForwardDone,
    GetCodecs,
    GradientMessage,
    GradientRequest,
    TakenCodecs,
    Working,
)
from swarmkit.net.protocol.messages import HIDDEN_DTYPES, Fault
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.faults import error_of
from swarmkit.net.rpc.message_stream import IncomingMessage


@dataclass
class Traffic:
    """What was sent and received, in bytes of tensors, and how many requests that were."""

    requests: int = 0
    sent: int = 0
    received: int = 0


@dataclass(eq=False)
class Line:
    """A stream to a server, for one request after the other."""

    stream: ClientStream
    traffic: Traffic
    codecs: tuple[CodecName, ...] = field(default=(), init=False)
    """Those that the server takes and gives besides `none`, as far as it was asked."""

    async def agree(self, timeout_s: float) -> None:
        """Ask in which codecs tensors may travel, before the first of them does.

        Raises:
            PeerError: the server failed.
        """
        with self.stream.within(timeout_s):
            self.codecs = (await self.stream.ask(GetCodecs(), TakenCodecs)).names

    def close(self) -> None:
        self.stream.close()

    async def ask(
        self, fingerprint: str, question: PassRequest, deadline_s: float
    ) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """Send a request and take the answer to it, and the gradient of the adapter's values, if wanted; and
        the bytes per second that the way to the server carries, as far as it knows.

        Args:
            deadline_s: after so many seconds without progress the server is given up.

        Raises:
            PeerError: it failed.
        """
        given, scale = question.span.given, _scale_of(question)
        message, payload = await off_loop(given.nbytes, lambda: _encoded(fingerprint, question, scale))
        shape = question.answer_shape
        wants = question.trains and question.gradient is not None
        numel = question.adapter.values.numel() if wants and question.adapter is not None else None
        self.stream.max_payload_bytes = (math.prod(shape) + (numel or 0)) * 4
        self.traffic.requests += 1
        with self.stream.within(deadline_s):
            await self.stream.send(message, payload)
            self.traffic.sent += sum(part.nbytes for part in payload)
            received = await self._answer(message, deadline_s)
        done = cast(ForwardDone | BackwardDone, received.message)
        answer = await off_loop(
            given.nbytes, lambda: self._checked(received, done.hidden, shape, question.codecs.answer)
        )
        self.traffic.received += done.hidden.nbytes
        of_adapter = None
        if isinstance(received.message, BackwardDone) and (numel is None) != (
            received.message.adapter is None
        ):
            raise ProtocolError("the gradient of an adapter is missing, or too much", self.stream.peer_id)
        if numel is not None:
            spec = cast(TensorSpec, cast(BackwardDone, received.message).adapter)
            of_adapter = self._checked(received, spec, (numel,))
            self.traffic.received += of_adapter.nbytes
        if scale != 1.0:
            answer, of_adapter = answer / scale, None if of_adapter is None else of_adapter / scale
        return answer, of_adapter, done.bytes_per_s

    async def _answer(self, message: GradientRequest, deadline_s: float) -> IncomingMessage:
        peer_id, done = self.stream.peer_id, 0
        expected = BackwardDone if isinstance(message, Backward) else ForwardDone
        while True:
            received = await self.stream.receive()
            answer = cast(GradientMessage, received.message)
            if isinstance(answer, Working) and done < answer.done <= answer.total:
                # It cannot go on for ever: there are so many parts as the first word says at most.
                if answer.total > _parts(message):
                    raise ProtocolError("the request has fewer parts than the server says", peer_id)
                done = answer.done
                self.stream.extend(deadline_s)
            elif isinstance(answer, Fault):
                raise error_of(answer, peer_id)
            elif isinstance(answer, expected):
                return received
            else:
                raise ProtocolError(f"expected an answer, got {type(answer).__name__}", peer_id)

    def _checked(
        self, received: IncomingMessage, spec: TensorSpec, shape: tuple[int, ...], name: CodecName = "none"
    ) -> torch.Tensor:
        """Args: name: the codec that was asked for."""
        if spec.shape != shape or spec.dtype not in HIDDEN_DTYPES or spec.codec not in ("none", name):
            raise ProtocolError(
                f"the answer must be {list(shape)} as {name}, got {list(spec.shape)} of {spec.dtype} "
                f"as {spec.codec}",
                self.stream.peer_id,
            )
        answer = received.tensor(spec)
        if not codec.is_finite(answer):
            raise ProtocolError("the answer contains NaN or infinity", self.stream.peer_id)
        return answer


def _parts(message: GradientRequest) -> int:
    """Rows x blocks that a server has to go through, there and back."""
    there = message.hidden.shape[0] * (message.stop - message.start)
    return 2 * there if isinstance(message, Backward) else there


def _scale_of(question: PassRequest) -> float:
    """A power of two with which the gradient is sent, and by which the answer is divided.

    Gradients are small, and float16 has no small numbers: without it, most of them would become 0. A backward
    pass is linear in the gradient, and a power of two is exact.
    """
    gradient, codecs = question.gradient, question.codecs
    if gradient is None or "float16" not in (codecs.gradient, codecs.answer):
        return 1.0
    largest = float(gradient.abs().max())
    return 1.0 if largest == 0.0 else 2.0 ** -min(max(math.frexp(largest)[1], -100), 100)


def _encoded(
    fingerprint: str, question: PassRequest, scale: float
) -> tuple[GradientRequest, list[memoryview]]:
    span, side, codecs = question.span, question.side, question.codecs
    given = span.given if codecs.hidden == span.codec else codec.passed(span.given, span.codec)
    hidden, data = codec.encode(given, codecs.hidden)
    payload = [data]
    specs = []
    for tensor in (side.mask, side.positions):
        spec, part = (None, None) if tensor is None else codec.encode(tensor)
        specs.append(spec)
        if part is not None:
            payload.append(part)
    mask, positions = specs
    common = (
        fingerprint,
        span.start,
        span.stop,
        hidden,
        mask,
        positions,
        question.states,
        question.adapter_name,
        question.trains,
        codecs.answer,
    )
    if question.gradient is None:
        return Forward(*common, returns=question.returns), payload
    sent = question.gradient if scale == 1.0 else question.gradient * scale
    gradient, data = codec.encode(sent, codecs.gradient)
    return Backward(*common, gradient=gradient), [*payload, data]
