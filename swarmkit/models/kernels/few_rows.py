"""Linear layers whose product with a few rows is computed in the way that is the fastest on this machine.

An engine has a few rows most of the time: tokens of some clients, some draft tokens. Matrix libraries are
made for one row, or for many, and not for every processor. On one without AVX512, the library that torch
calls read a weight for one row at two thirds of the memory's speed, and first copied it into an order of its
own for more: two rows took 2.2 times as long as one, eight 3.5 times. Other ways to the same product, all of
torch's own:

- a few of the outputs at a time, so that the library's copy stays in the cache;
- oneDNN, which torch uses for other dtypes, with the weight as it lies;
- the weight as the left matrix and the rows as the right one.

The fastest way for each number of rows is found once for each shape by trying, and remembered. The weights
stay as they are, and the products are the same but for rounding.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarmkit.models.kernels.choices import recall_choice, remember_choice
from swarmkit.models.kernels.replace_linear import (
    SMALLEST,
    can_be_replaced,
    gives_products,
    median_seconds,
    noise_rows,
    noise_weight,
    replace_linear,
    with_weights_of,
)

logger = logging.getLogger(__name__)
_choosing = threading.Lock()

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Multiplies rows [rows, in] by a weight [out, in], and adds a bias [out]."""

PLAIN = "plain"
CUTS = (16, 128)
"""Numbers of outputs of one part that are tried."""
MANY_ROWS = 49
"""From so many rows on, all are computed in the same way."""
_UP_TO_ROWS = (1, 2, 3, 6, 12, 24, MANY_ROWS - 1, MANY_ROWS)
"""The largest number of rows in each range that is computed in the same way."""
_TRIED_ROWS = (1, 2, 3, 4, 8, 16, 32, 128)
_CHECKED_ROWS = (1, 3, 33)
_CHECKED_OUTPUTS = 128
"""A multiple of all cuts."""
_FASTER = 1.1
_TRIALS = 3
_TRIED_VALUES = 2**22
"""Of a larger weight only a part is tried, so that neither loading nor a token takes longer."""
_CACHE_VALUES = 2**23
"""Values that a processor's cache hardly holds: a token finds no weight there."""
_BOUND = 1e-4
"""Largest difference that the order of additions may make, where values are about 1."""
COMPARISON = 2
"""To be raised with each change of what is compared, or how: what was remembered before counts no more."""


def cut_product(given: Tensor, weight: Tensor, bias: Tensor | None, cut: int) -> Tensor:
    """A `Product` with `cut` outputs at a time; `out` is a multiple of it."""
    outputs, inputs = weight.shape
    parts = weight.view(outputs // cut, cut, inputs).transpose(1, 2)
    product = torch.bmm(given.expand(outputs // cut, *given.shape), parts)
    product = product.transpose(0, 1).reshape(given.shape[0], outputs)
    return product if bias is None else product + bias


def onednn_product(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A `Product` by oneDNN, whose own order the weight may have. The operation is not part of torch's public
    interface, and may be missing.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")
    return product


def turned_product(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A `Product` of the weight with the rows."""
    product = (weight @ given.T).T.contiguous()
    return product if bias is None else product + bias


WAYS: Mapping[str, Product] = {
    PLAIN: functional.linear,
    **{f"cut {cut}": functools.partial(cut_product, cut=cut) for cut in CUTS},
    "oneDNN": onednn_product,
    "turned": turned_product,
}


def multiply_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, way_of: Sequence[str]) -> Tensor:
    """The product of `rows` [rows, in] with a weight [out, in], and the bias [out], without gradients.

    It is torch's own but for the order of additions.

    Args: way_of: for each number of rows, the name of a way, the last of them for more rows; none: plain.
    """
    way = way_of[min(len(rows), len(way_of) - 1)] if way_of else PLAIN
    if way == PLAIN or not weight.is_contiguous():
        return functional.linear(rows, weight, bias)
    return WAYS[way](rows, weight, bias)


class FewRowsLinear(nn.Linear):
    """A frozen linear layer that computes its product in a way that depends on the number of rows."""

    way_of: Sequence[str]
    """For each number of rows, the name of a way; the last of them for more rows."""

    @classmethod
    def of(cls, layer: nn.Linear, way_of: Sequence[str]) -> FewRowsLinear:
        """Make a layer that shares the weights of another."""
        same = with_weights_of(layer, cls)
        same.way_of = way_of
        return same

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        if not rows or (torch.is_grad_enabled() and input.requires_grad):
            return functional.linear(input, self.weight, self.bias)
        product = multiply_rows(input.reshape(rows, -1), self.weight, self.bias, self.way_of)
        return product.view(*input.shape[:-1], self.out_features)


def use_ways(model: nn.Module) -> int:
    """Replace large linear layers of a frozen model on a CPU where that is faster; returns how many."""
    return replace_linear(
        model, lambda layer: FewRowsLinear.of(layer, way_of) if (way_of := _ways(layer)) else None
    )


def _ways(layer: nn.Linear) -> Sequence[str]:
    weight = layer.weight
    if not can_be_replaced(layer) or not weight.is_contiguous():
        return ()
    return fastest_ways(*weight.shape, weight.dtype, torch.get_num_threads())


@functools.cache
def fastest_ways(outputs: int, inputs: int, dtype: torch.dtype, threads: int) -> Sequence[str]:
    """For each number of rows from 0 to `MANY_ROWS`, the way that takes the least time; empty: all plain, as
    for a small weight, or another dtype than float32.

    It is measured once on a machine, which takes some tenths of a second; other threads wait for that. That
    the products are the same is checked in each process.
    """
    if outputs * inputs < SMALLEST or dtype is not torch.float32:
        return ()
    with _choosing:
        return _chosen_ways(outputs, inputs, threads)


def _chosen_ways(outputs: int, inputs: int, threads: int) -> Sequence[str]:
    question = f"ways of [{outputs}, {inputs}], float32, {threads} threads, comparison {COMPARISON}"
    weight = noise_weight(min(outputs, _CHECKED_OUTPUTS), inputs)
    possible = [way for way in WAYS if _is_possible(way, outputs) and _is_right(way, weight)]
    known = recall_choice(question)
    if not _are_ways(known, possible):
        known = _measured_ways(outputs, inputs, possible)
        remember_choice(question, known)
    return tuple(known) if set(known) > {PLAIN} else ()


def _are_ways(known: Any, possible: Sequence[str]) -> bool:
    """Whether a remembered value is a list of ways that are possible for this layer."""
    if not isinstance(known, list) or len(known) != MANY_ROWS + 1 or known[0] != PLAIN:
        return False
    return all(way in possible for way in known)


def _is_possible(way: str, outputs: int) -> bool:
    name, _, cut = way.partition(" ")
    return name != "cut" or outputs % int(cut) == 0


@torch.inference_mode()
def _is_right(way: str, weight: Tensor) -> bool:
    """Whether a way gives the product on this machine, but for the order of additions."""
    try:
        if gives_products(lambda given: WAYS[way](given, weight, None), weight, _CHECKED_ROWS, _BOUND):
            return True
        logger.warning("products that are computed as %r are others here", way)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("products cannot be computed as %r here: %s", way, error)
    return False


@torch.inference_mode()
def _measured_ways(outputs: int, inputs: int, possible: Sequence[str]) -> list[str]:
    noise = noise_weight(tried_outputs(outputs, inputs, max(CUTS)), inputs)
    weights = [noise, *(noise.clone() for _ in range(_CACHE_VALUES // noise.numel() - 1))]

    def multiply(given: Tensor, way: str) -> list[Tensor]:
        return [WAYS[way](given, one, None) for one in weights]

    found = [PLAIN]
    for up_to, rows in zip(_UP_TO_ROWS, _TRIED_ROWS, strict=True):
        given = noise_rows(rows, noise)
        # Many rows are worth a copy of all of the weight, and take long to try.
        tried = [way for way in possible if up_to < MANY_ROWS or not way.startswith("cut")]
        taken_s = measured_seconds([functools.partial(multiply, given, way) for way in tried])
        of_way = dict(zip(tried, taken_s, strict=True))
        best = min(of_way, key=of_way.__getitem__)
        if of_way[best] * _FASTER > of_way[PLAIN]:
            best = PLAIN
        found += [best] * (up_to + 1 - len(found))
    return found


def tried_outputs(outputs: int, inputs: int, cut: int) -> int:
    """How many outputs of a weight are tried: all, or of a large one a multiple of `cut`."""
    return min(outputs, max(_TRIED_VALUES // inputs // cut, 1) * cut)


def measured_seconds(works: Sequence[Callable[[], object]]) -> list[float]:
    """How long each takes, by trying."""
    return median_seconds(works, _TRIALS)
