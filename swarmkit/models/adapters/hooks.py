"""Adapters in a forward pass: while it runs, hooks on the blocks' linear layers add the adapters' outputs.

Weights stay as they are, so that one pass serves sessions with different adapters and with none. Where the
tokens of many sessions lie behind one another (`packed`), each adapter is given just the rows of its
sessions:

    row     |a a a a|b|c c|d|     a and d have the same adapter, b has another, c none:
    W x     one product for all;  + B1 A1 x over the rows of a and d;  + B2 A2 x over those of b

Rows without an adapter pass through the same operations as without any, and are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarmkit.errors import UsageError
from swarmkit.models.adapters.adapter import Adapter, Tensors


@dataclass(frozen=True)
class Segment:
    """One session's tokens in a pass: `rows` x `tokens`, behind `past` tokens that it holds already."""

    tensors: Tensors | None
    rows: int
    tokens: int
    past: int
    order: Sequence[int] | None = None
    """For each row, whose prompts it has, where rows have their own; None = row i has those of row i."""

    @classmethod
    def of(
        cls, adapter: Adapter | None, hidden: Tensor, past: int, order: Sequence[int] | None = None
    ) -> Segment:
        """Make the segment of hidden states `[rows, tokens, hidden]` of a session with an adapter, or
        without.
        """
        return cls(
            None if adapter is None else adapter.tensors, hidden.shape[0], hidden.shape[1], past, order
        )


class AdapterHooks:
    """Applies adapters to some blocks."""

    def __init__(self, blocks: Mapping[int, nn.Module], first_argument: str) -> None:
        """Args:
        blocks: by number.
        first_argument: name of a block's argument for its hidden states.
        """
        self._blocks = blocks
        self._first = first_argument

    @contextmanager
    def applied(self, start: int, stop: int, segments: Sequence[Segment]) -> Iterator[None]:
        """Apply the segments' adapters to passes through blocks [start, stop) within this context.

        Args:
            segments: one, with hidden states as they are; or several, packed into a batch of one.
        """
        if all(segment.tensors is None for segment in segments):
            yield
            return
        packed = _PackedAdapters(segments)
        handles = []
        try:
            for block, module in {
                place
                for segment in segments
                if segment.tensors is not None
                for place in segment.tensors.lora
                if start <= place[0] < stop
            }:
                layer = self._blocks[block].get_submodule(module)
                handles.append(layer.register_forward_hook(packed.lora(block, module)))
            for block in range(start, stop):
                hook = packed.prompts(block, self._first)
                if hook is not None:
                    # A copy of a block, as views have them, shares its hooks.
                    handles.append(self._blocks[block].register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _PackedAdapters:
    """Adapters of several sessions, and the rows of each session in one pass."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._alone = len(segments) == 1
        self._spans: list[tuple[int, int]] = []
        begin = 0
        for segment in segments:
            self._spans.append((begin, begin + segment.rows * segment.tokens))
            begin = self._spans[-1][1]
        self._total = begin

    def lora(self, block: int, module: str) -> Callable[..., Tensor]:
        """Make a forward hook for a linear layer."""
        work: list[tuple[tuple[Tensor, Tensor, float], list[tuple[int, int]]]] = []
        known: dict[int, int] = {}
        for segment, span in zip(self._segments, self._spans, strict=True):
            part = None if segment.tensors is None else segment.tensors.lora.get((block, module))
            if part is None:
                continue
            place = known.setdefault(id(segment.tensors), len(work))
            if place == len(work):
                work.append((part, []))
            work[place][1].append(span)

        def alone(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            (part, _) = work[0]
            return (out + _delta(args[0], *part)).to(out.dtype)

        def packed(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            given: Tensor = args[0]
            rows = given.reshape(-1, given.shape[-1])
            if len(rows) != self._total:
                raise UsageError(f"{module} is not run over each token once, so sessions cannot share a pass")
            flat = out.reshape(-1, out.shape[-1])
            for part, spans in work:
                chosen = [rows[low:high] for low, high in spans]
                delta = _delta(chosen[0] if len(chosen) == 1 else torch.cat(chosen), *part)
                for (low, high), piece in zip(
                    spans, delta.split([high - low for low, high in spans]), strict=True
                ):
                    flat[low:high] = flat[low:high] + piece
            return flat.view(out.shape)

        return alone if self._alone else packed

    def prompts(self, block: int, first: str) -> Callable[..., Any] | None:
        """Make a forward pre-hook for a block; None if no token of the pass has a prompt there."""
        work = []
        for segment, (low, high) in zip(self._segments, self._spans, strict=True):
            prompt = None if segment.tensors is None else segment.tensors.prompts.get(block)
            if prompt is not None and segment.past < prompt.shape[-2]:
                if prompt.ndim == 3 and segment.order is not None:
                    prompt = prompt[list(segment.order)]
                shape = segment.rows, segment.tokens
                work.append((prompt[..., segment.past : segment.past + segment.tokens, :], low, high, shape))
        if not work:
            return None

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given: Tensor = args[0] if args else kwargs[first]
            hidden = given.clone(memory_format=torch.contiguous_format)
            for prompt, low, high, shape in work:
                rows = hidden if self._alone else hidden[0, low:high].view(*shape, hidden.shape[-1])
                rows[:, : prompt.shape[-2]] += prompt.to(hidden.dtype)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, first: hidden})

        return hook


def _delta(given: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return s B A x, computed in the adapter's dtype, as PEFT does."""
    return functional.linear(functional.linear(given.to(a.dtype), a), b) * scale
