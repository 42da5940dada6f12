"""Linear layers whose product with a few rows is cut into parts that fit into a processor's cache.

One row is a product of a matrix and a vector, which reads each weight once. For two rows and more, matrix
libraries first copy the weights into an order of their own, which pays for many rows: on a processor without
AVX512, two rows took 2.2 times as long as one, eight 3.5 times. If a few of the outputs are copied at a time,
the copy stays in the cache, and two and eight rows take 1.4 and 2.3 times as long. An engine has a few rows
most of the time: tokens of some clients, some draft tokens, a chunk of a prompt beside them.

The fastest cut, if any is worthwhile, is found once for each shape by trying, and remembered. The weights
stay as they are, and the products are the same but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarmkit.models.kernels.choices import recall_choice, remember_choice
from swarmkit.models.kernels.replace_linear import (
    can_be_replaced,
    median_seconds,
    replace_linear,
    with_weights_of,
)

CUTS = (16, 128)
"""Numbers of outputs of one part that are tried."""
_UP_TO_ROWS = (4, 12, 24, 48)
"""The largest number of rows in each range that is cut alike; more rows are worth the copy."""
_TRIED_ROWS = (2, 8, 16, 32)
_FASTER = 1.15
_TRIALS = 5
_TRIED_VALUES = 2**22
"""Of a larger weight only a part is tried, so that neither loading nor a token takes longer."""
COMPARISON = 1
"""To be raised with each change of what is compared, or how: what was remembered before counts no more."""


class CutLinear(nn.Linear):
    """A frozen linear layer that cuts its product, depending on the number of rows."""

    cut_of: Sequence[int]
    """For each number of rows, outputs of one part; 0: the product is not cut."""

    @classmethod
    def of(cls, layer: nn.Linear, cut_of: Sequence[int]) -> CutLinear:
        """Make a layer that shares the weights of another."""
        same = with_weights_of(layer, cls)
        same.cut_of = cut_of
        return same

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        cut = self.cut_of[rows] if rows < len(self.cut_of) else 0
        if not cut or (torch.is_grad_enabled() and input.requires_grad):
            return functional.linear(input, self.weight, self.bias)
        product = cut_product(input.reshape(rows, self.in_features), self.weight, cut, self.bias)
        return product.view(*input.shape[:-1], self.out_features)


def cut_product(given: Tensor, weight: Tensor, cut: int, bias: Tensor | None = None) -> Tensor:
    """Multiply `[rows, in]` by `weight`, `[out, in]`, `cut` outputs at a time, and add the bias, `[out]`.

    `out` is a multiple of `cut`.
    """
    outputs, inputs = weight.shape
    parts = weight.view(outputs // cut, cut, inputs).transpose(1, 2)
    product = torch.bmm(given.expand(outputs // cut, *given.shape), parts)
    product = product.transpose(0, 1).reshape(given.shape[0], outputs)
    return product if bias is None else product + bias


def use_cuts(model: nn.Module) -> int:
    """Replace large linear layers of a frozen model on a CPU where that is faster; returns how many."""
    return replace_linear(
        model, lambda layer: CutLinear.of(layer, cut_of) if any(cut_of := _cuts(layer)) else None
    )


def _cuts(layer: nn.Linear) -> Sequence[int]:
    weight = layer.weight
    if not can_be_replaced(layer) or weight.dtype is not torch.float32 or not weight.is_contiguous():
        return ()
    return fastest_cuts(layer.out_features, layer.in_features, torch.get_num_threads())


@functools.cache
def fastest_cuts(outputs: int, inputs: int, threads: int) -> Sequence[int]:
    """For each number of rows from 0 on, the cut that takes the least time; 0: none is worthwhile.

    It is measured once on a machine.
    """
    question = f"cuts of [{outputs}, {inputs}], float32, {threads} threads, comparison {COMPARISON}"
    possible = [cut for cut in CUTS if outputs % cut == 0]
    known = recall_choice(question)
    if not _are_cuts(known, possible):
        known = _measured_cuts(outputs, inputs, possible)
        remember_choice(question, known)
    return tuple(known)


def _are_cuts(known: Any, possible: Sequence[int]) -> bool:
    """Whether a remembered value is a list of cuts that this layer can have."""
    if not isinstance(known, list) or len(known) != _UP_TO_ROWS[-1] + 1 or known[:2] != [0, 0]:
        return False
    return all(type(cut) is int and (cut == 0 or cut in possible) for cut in known)


@torch.inference_mode()
def _measured_cuts(outputs: int, inputs: int, possible: Sequence[int]) -> list[int]:
    tried = tried_outputs(outputs, inputs, max(possible, default=1))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(tried, inputs, generator=generator)
    found = [0, 0]
    for up_to, rows in zip(_UP_TO_ROWS, _TRIED_ROWS, strict=True):
        given = torch.randn(rows, inputs, generator=generator)
        plain = functools.partial(functional.linear, given, weight)
        plain_s, *taken_s = measured_seconds(
            [plain, *(functools.partial(cut_product, given, weight, cut) for cut in possible)]
        )
        best, least_s = 0, plain_s / _FASTER
        for cut, seconds in zip(possible, taken_s, strict=True):
            if seconds < least_s:
                best, least_s = cut, seconds
        found += [best] * (up_to + 1 - len(found))
    return found


def tried_outputs(outputs: int, inputs: int, cut: int) -> int:
    """How many outputs of a weight are tried: all, or of a large one a multiple of `cut`."""
    return min(outputs, max(_TRIED_VALUES // inputs // cut, 1) * cut)


def measured_seconds(works: Sequence[Callable[[], object]]) -> list[float]:
    """How long each takes, by trying."""
    return median_seconds(works, _TRIALS)
