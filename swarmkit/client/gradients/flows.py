"""What becomes of one micro-batch: which blocks are next, and what has to be kept for the way back.

::

    forward   x0 ─[a, b)─> x1 ─[b, c)─> x2 ─[c, d)─> output          kept: (a, b, x0), (b, c, x1), (c, d, x2)
    backward  gradient of x0 <─(a, b, x0)─ <─(b, c, x1)─ <─(c, d, x2)─ gradient of the output

Any server with the blocks [b, c) can do that part of the backward pass. Where only servers with other
boundaries are left, say of [b, m) and [m, c), the first one runs its blocks forward over x1, and the part is
two from then.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from swarmkit.client.adapters.model_adapters import ClientAdapter, ServerAdapter
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.net.protocol.codec import CodecName

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Side:
    """What goes beside the hidden states of some rows."""

    mask: Tensor | None = None
    """`[rows, tokens]`, uint8; None = no padding."""
    positions: Tensor | None = None
    """`[rows, tokens]`, int64; None = 0, 1, …"""

    def rows(self, low: int, high: int) -> Side:
        return Side(
            None if self.mask is None else self.mask[low:high],
            None if self.positions is None else self.positions[low:high],
        )


@dataclass(frozen=True)
class Span:
    """Blocks [start, stop) that one server ran over a micro-batch, and what it was given."""

    start: int
    stop: int
    given: Tensor
    """`[rows, tokens, hidden]`."""
    by: str = ""
    """The peer that ran it, and may have kept its activations; a peer id."""
    codec: CodecName = "none"
    """In which `given` was sent: the server computed on what that codec makes of it."""


@dataclass(frozen=True)
class WireCodecs:
    """In what the tensors of one request and of its answer travel."""

    hidden: CodecName = "none"
    gradient: CodecName = "none"
    answer: CodecName = "none"


@dataclass(frozen=True)
class PassRequest:
    """What a server is asked: to run `span`, and with a gradient to go back through it."""

    span: Span
    side: Side
    states: bool
    gradient: Tensor | None = None
    adapter: Adapter | None = None
    """For the span's blocks, to be sent to the server before."""
    hosted: str = ""
    """Or the hash of one that the server has."""
    trains: bool = False
    """The gradient with respect to the adapter is wanted, on the way back."""
    returns: bool = False
    """There will be a way back."""
    is_repeated: bool = False
    """A part of a forward pass that was computed before, which is wanted again as it was."""
    codecs: WireCodecs = WireCodecs()

    @property
    def adapter_name(self) -> str:
        """What the server calls the adapter; takes a hash at first."""
        return self.hosted if self.adapter is None else self.adapter.digest

    @property
    def direction(self) -> Direction:
        return "forward" if self.gradient is None else "backward"

    @property
    def tokens(self) -> int:
        return self.span.given.shape[0] * self.span.given.shape[1]

    @property
    def units(self) -> int:
        return self.tokens * (self.span.stop - self.span.start)

    @property
    def is_stacked(self) -> bool:
        """The answer has the outputs of all blocks."""
        return self.states and self.gradient is None

    @property
    def answer_shape(self) -> tuple[int, ...]:
        shape = tuple(self.span.given.shape)
        return (self.span.stop - self.span.start, *shape) if self.is_stacked else shape


class Flow(Protocol):
    """One micro-batch in one direction."""

    index: int

    @property
    def wanted(self) -> tuple[int, int] | None:
        """The blocks that a server may be asked for next, from the first one on; None = nothing is left."""

    @property
    def blocks(self) -> tuple[int, int]:
        """All blocks that are still to be passed, in either direction."""

    @property
    def tokens(self) -> int:
        """Rows x tokens."""

    @property
    def direction(self) -> Direction:
        """Which way most of its work goes."""

    @property
    def kept_by(self) -> str:
        """The peer that may have kept the activations; "" = none has."""

    def most_blocks(self) -> int | None:
        """How many blocks a request may have; None = any number."""

    def question(self, start: int, stop: int) -> PassRequest:
        """What the server is asked that takes blocks [start, stop), the beginning of `wanted`."""

    def take(self, question: PassRequest, answer: Tensor, of_adapter: Tensor | None, peer_id: str) -> None:
        """A peer's answer came, and the gradient of the adapter's values `[numel]` for the blocks asked."""


@dataclass(eq=False)
class ForwardFlow:
    """The way there."""

    index: int
    position: int
    stop: int
    hidden: Tensor
    side: Side
    states: bool
    most_state_tokens: int
    """Rows x tokens x blocks of one answer with the states of all blocks."""
    adapter: ClientAdapter | ServerAdapter | None = None
    returns: bool = False
    """There will be a way back, for the adapter too if it is trained."""
    spans: list[Span] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    """Of all blocks, `[blocks, rows, tokens, hidden]` for each span, if these are wanted."""

    @property
    def wanted(self) -> tuple[int, int] | None:
        return (self.position, self.stop) if self.position < self.stop else None

    @property
    def blocks(self) -> tuple[int, int]:
        return self.position, self.stop

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0] * self.hidden.shape[1]

    @property
    def direction(self) -> Direction:
        return "forward"

    @property
    def kept_by(self) -> str:
        return ""

    def most_blocks(self) -> int | None:
        return max(1, self.most_state_tokens // self.tokens) if self.states else None

    def question(self, start: int, stop: int) -> PassRequest:
        span = Span(start, stop, self.hidden)
        adapter, hosted = _part_of(self.adapter, start, stop)
        trains = self.returns and adapter is not None and self.adapter is not None and self.adapter.trains
        return PassRequest(span, self.side, self.states, None, adapter, hosted, trains, self.returns)

    def take(self, question: PassRequest, answer: Tensor, of_adapter: Tensor | None, peer_id: str) -> None:
        self.spans.append(replace(question.span, by=peer_id))
        self.position = question.span.stop
        if self.states:
            self.outputs.append(answer)
            self.hidden = answer[-1]
        else:
            self.hidden = answer

    @property
    def output(self) -> Tensor:
        """`[rows, tokens, hidden]`, or of all blocks `[blocks, rows, tokens, hidden]`."""
        return torch.cat(self.outputs) if self.states else self.hidden


@dataclass(eq=False)
class BackwardFlow:
    """The way back."""

    index: int
    start: int
    """The first of all blocks."""
    spans: list[Span]
    gradient: Tensor
    """With respect to the output of the last of `spans`; with `states` that of all blocks, and of the output
    of the last span through what is behind it in `behind`."""
    side: Side
    states: bool
    adapter: ClientAdapter | ServerAdapter | None = None
    of_adapter: Tensor | None = None
    """The gradient with respect to all values of the adapter, as far as it is known; None if not wanted."""
    behind: Tensor | None = None

    @property
    def wanted(self) -> tuple[int, int] | None:
        return (self.spans[-1].start, self.spans[-1].stop) if self.spans else None

    @property
    def blocks(self) -> tuple[int, int]:
        return self.spans[0].start, self.spans[-1].stop

    @property
    def tokens(self) -> int:
        given = self.spans[-1].given
        return given.shape[0] * given.shape[1]

    @property
    def direction(self) -> Direction:
        return "backward"

    @property
    def kept_by(self) -> str:
        return self.spans[-1].by

    def most_blocks(self) -> int | None:
        return None

    def question(self, start: int, stop: int) -> PassRequest:
        span = self.spans[-1]
        adapter, hosted = _part_of(self.adapter, start, stop)
        if stop < span.stop:
            part = replace(span, stop=stop, by="")
            return PassRequest(part, self.side, False, None, adapter, hosted, is_repeated=True)
        trains = self.of_adapter is not None and adapter is not None
        return PassRequest(span, self.side, self.states, self._gradient_of(span), adapter, hosted, trains)

    def take(self, question: PassRequest, answer: Tensor, of_adapter: Tensor | None, peer_id: str) -> None:
        span = self.spans.pop()
        if of_adapter is not None:
            assert isinstance(self.adapter, ClientAdapter)
            assert self.of_adapter is not None
            low, high = self.adapter.extent(question.span.start, question.span.stop)
            self.of_adapter[low:high] += of_adapter
        if question.gradient is None:
            middle = question.span.stop
            self.spans += [replace(span, stop=middle, by=""), Span(middle, span.stop, answer)]
        elif self.states:
            self.behind = answer
        else:
            self.gradient = answer

    @property
    def result(self) -> Tensor:
        """With respect to the micro-batch's input `[rows, tokens, hidden]`."""
        if not self.states:
            return self.gradient
        assert self.behind is not None
        return self.behind

    def _gradient_of(self, span: Span) -> Tensor:
        if not self.states:
            return self.gradient
        part = self.gradient[span.start - self.start : span.stop - self.start]
        if self.behind is None:
            return part
        part = part.clone()
        part[-1] += self.behind.to(part.dtype)
        return part


def _part_of(
    adapter: ClientAdapter | ServerAdapter | None, start: int, stop: int
) -> tuple[Adapter | None, str]:
    return (None, "") if adapter is None else (adapter.part(start, stop), adapter.hosted_name)
