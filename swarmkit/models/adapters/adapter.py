"""An adapter: a few trained numbers that change what some blocks compute, while their weights stay as they
are.

There are two kinds, which may be combined:

* LoRA (Hu et al., ICLR 2022, section 4.1): beside a linear layer W of a block, y = W x + s B A x, where A is
  [rank, in], B is [out, rank] and s is a number;
* deep prompts (Liu et al., "P-Tuning v2", 2022; in the additive form of Petals): P vectors for each block,
  added to its inputs at the positions 0 .. P - 1 of the sequence. All rows of a batch have the same ones, or
  each row has its own.

All values are one flat vector, block by block, so that consecutive blocks need one piece of it::

    | A, B of each module, by name | prompts [P, hidden] | A, B of each module …        or [rows, P, hidden]
    └─────────────────── block a ──────────────────────┘ └── block a + 1 …

All of this is plain data; `hooks` applies it, `files` reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swarmkit.errors import AdapterError

MAX_PROMPT_TOKENS = 4096
MAX_PROMPT_ROWS = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Lora(NamedTuple):
    """LoRA of one linear layer, by its name inside the block ("self_attn.q_proj"): its rank, and s."""

    block: int
    module: str
    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterSpec:
    """The form of an adapter for blocks [start, stop), without its values.

    Attributes:
        lora: sorted by block and module, each at most once.
        prompt_tokens: P, the number of prompt vectors; 0 for none.
        prompt_rows: rows of the batch that have prompts of their own; 0 where all rows have the same.
    """

    start: int
    stop: int
    lora: tuple[Lora, ...] = ()
    prompt_tokens: int = 0
    prompt_rows: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise AdapterError(f"an adapter is for blocks [start, stop), not [{self.start}, {self.stop})")
        if not 0 <= self.prompt_tokens <= MAX_PROMPT_TOKENS:
            raise AdapterError(f"deep prompts have 0 to {MAX_PROMPT_TOKENS} tokens, not {self.prompt_tokens}")
        if not 0 <= self.prompt_rows <= (MAX_PROMPT_ROWS if self.prompt_tokens else 0):
            raise AdapterError(
                f"prompts of {self.prompt_tokens} tokens for each of {self.prompt_rows} rows are no prompts, "
                f"or too many; there may be {MAX_PROMPT_ROWS} rows"
            )
        places = [(one.block, one.module) for one in self.lora]
        if any(one >= other for one, other in pairwise(places)):
            raise AdapterError("an adapter's parts come sorted by block and module, each once")
        for one in self.lora:
            if not self.start <= one.block < self.stop:
                raise AdapterError(f"{one.module} of block {one.block} is outside {self.start}:{self.stop}")
            if one.rank < 1 or not math.isfinite(one.scale):
                raise AdapterError(
                    f"{one.module} of block {one.block} has rank {one.rank} and scale {one.scale}; "
                    "a rank is at least 1, a scale a finite number"
                )

    @property
    def is_empty(self) -> bool:
        """Whether the adapter changes nothing."""
        return not self.lora and not self.prompt_tokens

    @property
    def blocks(self) -> range:
        return range(self.start, self.stop)

    def within(self, start: int, stop: int) -> AdapterSpec:
        """The part of the spec for blocks [start, stop)."""
        lora = tuple(one for one in self.lora if start <= one.block < stop)
        return AdapterSpec(start, stop, lora, self.prompt_tokens, self.prompt_rows)


@dataclass(frozen=True)
class Fittings:
    """The linear layers that an adapter can attach to.

    Attributes:
        linears: for each block, the features in and out of its linear layers, by name.
        unfit: for each block, the linear layers that cannot have an adapter, and why.
    """

    hidden_size: int
    linears: Mapping[int, Mapping[str, tuple[int, int]]]
    unfit: Mapping[int, Mapping[str, str]]

    @classmethod
    def of(cls, blocks: Mapping[int, nn.Module], hidden_size: int) -> Fittings:
        """Find those of some blocks of a model, on any device, the meta device too."""
        linears: dict[int, dict[str, tuple[int, int]]] = {}
        unfit: dict[int, dict[str, str]] = {}
        for number, block in blocks.items():
            linears[number], unfit[number] = {}, {}
            for name, module in block.named_modules():
                size = linear_size(module)
                if size is None:
                    continue
                if reason := _unfit(block, name):
                    unfit[number][name] = reason
                else:
                    linears[number][name] = size
        return cls(hidden_size, linears, unfit)

    def size(self, block: int, module: str) -> tuple[int, int]:
        """Features in and out of a linear layer.

        Raises:
            AdapterError: there is none of that name, or none that can have an adapter.
        """
        found = self.linears.get(block, {}).get(module)
        if found is not None:
            return found
        if reason := self.unfit.get(block, {}).get(module):
            raise AdapterError(f"{module} of block {block} cannot have an adapter: {reason}")
        if block not in self.linears:
            raise AdapterError(f"the adapter is for block {block}, which is not here")
        names = ", ".join(sorted(self.linears[block])) or "none"
        raise AdapterError(
            f"the adapter is for another model: block {block} has no linear layer {module!r}; it has {names}"
        )

    def check(self, spec: AdapterSpec, max_rank: int | None = None) -> None:
        """Raise AdapterError unless each part of the spec has a linear layer here, and a rank that is
        allowed.
        """
        for one in spec.lora:
            self.size(one.block, one.module)
            if max_rank is not None and one.rank > max_rank:
                raise AdapterError(
                    f"{one.module} of block {one.block} has rank {one.rank}, more than the {max_rank} allowed"
                )

    def numel(self, spec: AdapterSpec) -> int:
        """Number of values of an adapter of this spec."""
        lora = sum(one.rank * sum(self.size(one.block, one.module)) for one in spec.lora)
        rows = max(spec.prompt_rows, 1)
        return lora + len(spec.blocks) * rows * spec.prompt_tokens * self.hidden_size

    def slots(self, spec: AdapterSpec) -> Iterator[Slot]:
        """The place of each tensor in the flat vector, in its order."""
        offset = 0
        by_block: dict[int, list[Lora]] = {}
        for one in spec.lora:
            by_block.setdefault(one.block, []).append(one)
        for block in spec.blocks:
            for one in by_block.get(block, ()):
                inside, outside = self.size(block, one.module)
                for kind, shape in (("A", (one.rank, inside)), ("B", (outside, one.rank))):
                    yield Slot(block, one.module, kind, shape, offset)
                    offset += math.prod(shape)
            if spec.prompt_tokens:
                rows = (spec.prompt_rows,) if spec.prompt_rows else ()
                size = *rows, spec.prompt_tokens, self.hidden_size
                yield Slot(block, "", "prompts", size, offset)
                offset += math.prod(size)


class Slot(NamedTuple):
    """One tensor of an adapter and its place in the flat vector; `kind` is "A", "B" or "prompts"."""

    block: int
    module: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    def of(self, values: Tensor) -> Tensor:
        """The tensor as a view of the flat vector."""
        return values[self.offset : self.offset + math.prod(self.shape)].view(self.shape)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Features in and out of a linear layer, in whatever precision; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _unfit(block: nn.Module, name: str) -> str:
    """Why a linear layer cannot have an adapter, as it is not run once over each token; "" if it can."""
    path = name.split(".")
    if any(part.isdigit() for part in path):
        return "it is one of several experts, and sees only some of the tokens"
    parent: Any = block.get_submodule(name.rpartition(".")[0])
    if hasattr(parent, "expand_kv") and path[-1] == "kv_b_proj":
        return "it works on what is cached, at every step anew"
    return ""


class Adapter:
    """A spec and its values.

    Attributes:
        values: `[numel]`, floating; see the top of this file for their order.
    """

    def __init__(self, spec: AdapterSpec, values: Tensor, fittings: Fittings) -> None:
        """Raises:
        AdapterError: the spec asks for another number of values, or another dtype.
        """
        expected = fittings.numel(spec)
        if values.shape != (expected,) or values.dtype not in DTYPES:
            raise AdapterError(
                f"an adapter of this form has {expected} floating values, not {list(values.shape)} of "
                f"{values.dtype}; it may be for another model"
            )
        self.spec = spec
        self.values = values
        self.fittings = fittings

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(self.fittings.slots(self.spec))

    @cached_property
    def tensors(self) -> Tensors:
        """The values by block and module."""
        return Tensors.of(self.spec, self.slots, self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @cached_property
    def digest(self) -> str:
        """A hash of the adapter, 64 hex digits."""
        return digest_of(self.spec, self.values)

    def within(self, start: int, stop: int) -> Adapter:
        """The part of the adapter for blocks [start, stop); its values are a view."""
        low, high = extent(self.slots, start, stop)
        return Adapter(self.spec.within(start, stop), self.values[low:high], self.fittings)

    def of_rows(self, rows: Sequence[int]) -> Adapter:
        """The adapter of some rows of the batch, in that order; the same one where rows do not differ."""
        if not self.spec.prompt_rows:
            return self
        chosen = list(rows)
        views = [(slot.kind, slot.of(self.values)) for slot in self.slots]
        parts = [(view[chosen] if kind == "prompts" else view).reshape(-1) for kind, view in views]
        spec = replace(self.spec, prompt_rows=len(chosen))
        return Adapter(spec, torch.cat(parts), self.fittings)

    def add_of_rows(self, total: Tensor, of_rows: Tensor, rows: Sequence[int]) -> None:
        """Add the gradient of the values of `of_rows(rows)` to that of all values, `total` `[numel]`."""
        if not self.spec.prompt_rows:
            total += of_rows
            return
        chosen = list(rows)
        part = replace(self.spec, prompt_rows=len(chosen))
        for slot, small in zip(self.slots, self.fittings.slots(part), strict=True):
            if slot.kind == "prompts":
                slot.of(total).index_add_(0, torch.tensor(chosen, device=total.device), small.of(of_rows))
            else:
                slot.of(total).add_(small.of(of_rows))

    def to(self, device: torch.device) -> Adapter:
        """The same adapter with its values on `device`."""
        if self.values.device == device:
            return self
        return Adapter(self.spec, self.values.to(device), self.fittings)


@dataclass(frozen=True)
class Tensors:
    """An adapter's values by block and module.

    Attributes:
        lora: for each block and module A, `[rank, in]`, B, `[out, rank]`, and s.
        prompts: for each block, `[P, hidden]`, or `[rows, P, hidden]`.
    """

    lora: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]]
    prompts: Mapping[int, Tensor]

    @classmethod
    def of(cls, spec: AdapterSpec, slots: Sequence[Slot], values: Tensor) -> Tensors:
        """Views of the flat values."""
        scales = {(one.block, one.module): one.scale for one in spec.lora}
        parts: dict[tuple[int, str], list[Tensor]] = {}
        for slot in slots:
            parts.setdefault((slot.block, slot.module), []).append(slot.of(values))
        lora = {place: (parts[place][0], parts[place][1], scale) for place, scale in scales.items()}
        return cls(lora, {block: one[0] for (block, module), one in parts.items() if not module})


def extent(slots: Sequence[Slot], start: int, stop: int) -> tuple[int, int]:
    """Begin and end, in the flat vector, of the values of blocks [start, stop)."""
    inside = [slot for slot in slots if start <= slot.block < stop]
    if not inside:
        return 0, 0
    return inside[0].offset, inside[-1].offset + math.prod(inside[-1].shape)


def digest_of(spec: AdapterSpec, values: Tensor) -> str:
    """A hash of an adapter's spec and values, 64 hex digits."""
    prompts = [spec.prompt_tokens, spec.prompt_rows] if spec.prompt_rows else spec.prompt_tokens
    said = [spec.start, spec.stop, [list(one) for one in spec.lora], prompts, str(values.dtype)]
    digest = hashlib.sha256(b"swarmkit adapter 1\n" + json.dumps(said).encode() + b"\n")
    plain: Any = values.detach().cpu().contiguous().view(torch.uint8).numpy()
    digest.update(plain)
    return digest.hexdigest()
