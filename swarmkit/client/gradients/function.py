"""Remote blocks as autograd sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swarmkit.client.adapters.model_adapters import (
    ClientAdapter,
    ModelAdapters,
    PromptedAdapters,
    ServerAdapter,
)
from swarmkit.client.gradients.call import Call, Training
from swarmkit.client.gradients.flows import BackwardFlow, ForwardFlow, Side, Span
from swarmkit.client.gradients.plan import micro_batches
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.client.swarm.connection import Connection
from swarmkit.errors import UsageError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import CodecName

MOST_STATE_TOKENS = 4096
"""Rows x tokens x blocks of one answer with the states of all blocks."""


@dataclass(frozen=True)
class FullPass:
    """One call over whole sequences: which blocks, what goes beside the hidden states, what is wanted."""

    start: int
    stop: int
    side: Side
    states: bool = False


@dataclass(frozen=True)
class _SavedPass:
    """What the way back needs of one micro-batch, but for tensors: its rows, and its spans' blocks."""

    low: int
    high: int
    blocks: tuple[tuple[int, int, str, CodecName], ...]
    """The blocks of each span, the peer that ran them, and the codec in which it was sent their input."""


class RemotePass:
    """Runs blocks over whole sequences through the swarm; see `FullPass`."""

    def __init__(self, connection: Connection, adapters: ModelAdapters) -> None:
        self.connection = connection
        self.adapters = adapters
        self.training = Training()

    def __call__(self, hidden: Tensor, whole: FullPass, adapters: PromptedAdapters | None = None) -> Tensor:
        """Run the blocks over `hidden`, `[batch, tokens, hidden]`.

        Args: adapters: in the place of the model's own.

        Returns: their output, or with `states` that of every block `[blocks, batch, tokens, hidden]`; in the
            dtype and on the device of `hidden`, and differentiable with respect to it.

        Raises:
            UsageError: the hidden states are not finite, or shapes do not fit.
            NoRouteError, RemoteError: see `Call.run`.
        """
        _check(hidden, whole, self.connection.client)
        adapter = (adapters or self.adapters).current()
        if adapter is not None:
            adapter.begin(hidden.shape[0])
        values = adapter.values if isinstance(adapter, ClientAdapter) and adapter.trains else None
        if torch.is_grad_enabled() and (hidden.requires_grad or values is not None):
            output: Tensor = _Through.apply(hidden, values, whole, adapter, self)  # type: ignore[no-untyped-call]
            return output
        return self.forward(hidden.detach(), whole, adapter)[0]

    @property
    def trains(self) -> bool:
        """Whether there is an adapter that wants gradients."""
        adapter = self.adapters.current()
        return adapter is not None and adapter.trains

    def forward(
        self,
        hidden: Tensor,
        whole: FullPass,
        adapter: ClientAdapter | ServerAdapter | None,
        returns: bool = False,
    ) -> tuple[Tensor, list[ForwardFlow]]:
        """The output, and the micro-batches that it is made of.

        Args: returns: there will be a way back.
        """
        given = hidden.to("cpu")
        rows, tokens, _ = given.shape
        flows = [
            ForwardFlow(
                index,
                whole.start,
                whole.stop,
                given[low:high],
                whole.side.rows(low, high),
                whole.states,
                MOST_STATE_TOKENS,
                None if adapter is None else adapter.of_rows(low, high),
                returns,
            )
            for index, (low, high) in enumerate(micro_batches(rows, tokens, self._servers(whole)))
        ]
        self.connection.call(self._run, flows, adapter)
        output = torch.cat([flow.output for flow in flows], dim=1 if whole.states else 0)
        return output.to(hidden.device, hidden.dtype), flows

    def backward(
        self,
        hidden: Tensor,
        whole: FullPass,
        gradient: Tensor,
        saved: Sequence[_SavedPass],
        inner: Sequence[Tensor],
        adapter: ClientAdapter | ServerAdapter | None,
        trains: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients with respect to `hidden`, and to the adapter's values if it is trained.

        Args:
            inner: what each micro-batch's spans but the first were given, one after the other.
        """
        given, upstream = hidden.detach().to("cpu"), gradient.detach().to("cpu")
        rest = iter(inner)
        flows = []
        for index, part in enumerate(saved):
            rows = slice(part.low, part.high)
            inputs = [given[rows], *(next(rest) for _ in part.blocks[1:])]
            spans = [
                Span(a, b, span, by, name) for (a, b, by, name), span in zip(part.blocks, inputs, strict=True)
            ]
            side = whole.side.rows(part.low, part.high)
            own = upstream[:, rows] if whole.states else upstream[rows]
            tuned = None if adapter is None else adapter.of_rows(part.low, part.high)
            values = tuned.values if trains and isinstance(tuned, ClientAdapter) else None
            of_adapter = None if values is None else torch.zeros(values.shape)
            flows.append(BackwardFlow(index, whole.start, spans, own, side, whole.states, tuned, of_adapter))
        self.connection.call(self._run, flows, adapter)
        result = torch.cat([flow.result for flow in flows]).to(hidden.device, hidden.dtype)
        if not (trains and isinstance(adapter, ClientAdapter)):
            return result, None
        total = torch.zeros(adapter.values.shape)
        for flow, part in zip(flows, saved, strict=True):
            assert flow.of_adapter is not None
            adapter.add_of_rows(total, flow.of_adapter, part.low, part.high)
        return result, total

    async def _run(
        self,
        flows: Sequence[ForwardFlow] | Sequence[BackwardFlow],
        adapter: ClientAdapter | ServerAdapter | None,
    ) -> None:
        hosted_adapter = "" if adapter is None else adapter.hosted_name
        await Call(self.connection.client, self.training, flows, hosted_adapter).run()

    def _servers(self, whole: FullPass) -> int:
        """How many servers hold some of the blocks, as far as is known."""
        servers = self.connection.client.known.servers()
        return sum(server.start < whole.stop and whole.start < server.stop for server in servers)


class _Through(torch.autograd.Function):
    """Servers keep nothing between the two ways: what they were given is saved here, like any activation."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        values: Tensor | None,
        whole: FullPass,
        adapter: ClientAdapter | ServerAdapter | None,
        remote: RemotePass,
    ) -> Tensor:
        output, flows = remote.forward(hidden.detach(), whole, adapter, returns=True)
        ctx.whole, ctx.adapter, ctx.remote = whole, adapter, remote
        ctx.parts, low = [], 0
        for flow in flows:
            high = low + flow.spans[0].given.shape[0]
            blocks = tuple((span.start, span.stop, span.by, span.codec) for span in flow.spans)
            ctx.parts.append(_SavedPass(low, high, blocks))
            low = high
        # A span of the first block was given a part of `hidden`, whose later changes autograd notices.
        ctx.save_for_backward(hidden, *(span.given for flow in flows for span in flow.spans[1:]))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise UsageError(
                "remote blocks have first derivatives only: their servers send gradients, not graphs; "
                "leave create_graph out"
            )
        if not codec.is_finite(gradient):
            raise UsageError(
                "the gradient that comes from the loss contains NaN or infinity, so nothing was sent to the "
                "swarm; look at the loss and at what is between it and the remote blocks, or lower the "
                "learning rate"
            )
        hidden, *inner = ctx.saved_tensors
        trains = ctx.needs_input_grad[1]
        result, of_adapter = ctx.remote.backward(
            hidden, ctx.whole, gradient, ctx.parts, inner, ctx.adapter, trains
        )
        if of_adapter is not None:
            of_adapter = of_adapter.to(ctx.adapter.values.dtype)
        return result, of_adapter, None, None, None


def side_of(hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Side:
    """What goes beside hidden states `[batch, tokens, hidden]`; what says nothing is left out.

    Args:
        attention_mask: `[batch, tokens]`, nonzero = attend.
        position_ids: [batch or 1, tokens].

    Raises:
        UsageError: a shape does not fit.
    """
    if hidden.ndim != 3:
        raise UsageError(f"hidden states are [batch, tokens, hidden], not {list(hidden.shape)}")
    rows, tokens, _ = hidden.shape
    mask = positions = None
    if attention_mask is not None:
        if attention_mask.shape != (rows, tokens):
            raise UsageError(
                f"the attention mask must be [{rows}, {tokens}] = [batch, tokens], "
                f"got {list(attention_mask.shape)}"
            )
        if not bool(attention_mask.all()):
            mask = attention_mask.to("cpu").ne(0).to(torch.uint8)
    if position_ids is not None:
        if tuple(position_ids.shape) not in ((rows, tokens), (1, tokens)):
            raise UsageError(
                f"position ids must be [{rows}, {tokens}] = [batch, tokens], got {list(position_ids.shape)}"
            )
        given = position_ids.to("cpu", torch.int64).expand(rows, tokens)
        if mask is not None:
            given = torch.where(mask == 0, given.clamp(min=0), given)  # some models count padding as -1
        if not torch.equal(given, torch.arange(tokens).expand(rows, -1)):
            positions = given.contiguous()
    return Side(mask, positions)


def _check(hidden: Tensor, whole: FullPass, client: SwarmClient) -> None:
    width, blocks = client.model.hidden_size, client.model.num_blocks
    if hidden.ndim != 3 or hidden.shape[2] != width or 0 in hidden.shape:
        raise UsageError(f"hidden states are [batch, tokens, {width}], not {list(hidden.shape)}")
    if not 0 <= whole.start < whole.stop <= blocks:
        raise UsageError(f"blocks {whole.start}:{whole.stop} are not inside this model's 0:{blocks}")
    if not codec.is_finite(hidden.detach()):
        raise UsageError(
            "the hidden states contain NaN or infinity, so nothing was sent to the swarm; "
            "look at what comes before the remote blocks (diverged prompts or adapters, perhaps)"
        )
