"""One request for training to one server, and its answer, which is believed no further than can be seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch

from swarmkit.client.gradients.flows import PassRequest
from swarmkit.client.session.replica import off_loop
from swarmkit.errors import ProtocolError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.gradient_messages import (
    Backward,
    BackwardDone,
    Forward,
    ForwardDone,
    GradientMessage,
    GradientRequest,
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

    def close(self) -> None:
        self.stream.close()

    async def ask(
        self, fingerprint: str, question: PassRequest, deadline_s: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Send a request and take the answer to it, and the gradient of the adapter's values, if wanted.

        Args:
            deadline_s: after so many seconds without progress the server is given up.

        Raises:
            PeerError: it failed.
        """
        given = question.span.given
        message, payload = await off_loop(given.nbytes, lambda: _encoded(fingerprint, question))
        shape = question.answer_shape
        wants = question.trains and question.gradient is not None
        numel = question.adapter.values.numel() if wants and question.adapter is not None else None
        self.stream.max_payload_bytes = (math.prod(shape) + (numel or 0)) * 4
        self.traffic.requests += 1
        with self.stream.within(deadline_s):
            await self.stream.send(message, payload)
            self.traffic.sent += sum(part.nbytes for part in payload)
            received = await self._answer(message, deadline_s)
        answer = await off_loop(
            given.nbytes, lambda: self._checked(received, cast(ForwardDone, received.message).hidden, shape)
        )
        self.traffic.received += answer.nbytes
        of_adapter = None
        if isinstance(received.message, BackwardDone) and (numel is None) != (
            received.message.adapter is None
        ):
            raise ProtocolError("the gradient of an adapter is missing, or too much", self.stream.peer_id)
        if numel is not None:
            spec = cast(TensorSpec, cast(BackwardDone, received.message).adapter)
            of_adapter = self._checked(received, spec, (numel,))
            self.traffic.received += of_adapter.nbytes
        return answer, of_adapter

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

    def _checked(self, received: IncomingMessage, spec: TensorSpec, shape: tuple[int, ...]) -> torch.Tensor:
        if spec.shape != shape or spec.dtype not in HIDDEN_DTYPES:
            raise ProtocolError(
                f"the answer must be {list(shape)}, got {list(spec.shape)} of {spec.dtype}",
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


def _encoded(fingerprint: str, question: PassRequest) -> tuple[GradientRequest, list[memoryview]]:
    span, side = question.span, question.side
    hidden, data = codec.encode(span.given)
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
    )
    if question.gradient is None:
        return Forward(*common, returns=question.returns), payload
    gradient, data = codec.encode(question.gradient)
    return Backward(*common, gradient=gradient), [*payload, data]
