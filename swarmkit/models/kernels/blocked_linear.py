"""Linear layers whose weights are in oneDNN's blocked order.

torch multiplies float32 matrices on a CPU with a library that uses half of what some processors can do, and
gives oneDNN its bfloat16 weights in an order that it must change at every call. torch can also keep the
weights in oneDNN's own blocked order, as it does itself when it freezes a compiled model. Where that gives
the same numbers faster, the layers of a stage are replaced; each shape is tried once on a machine.

The two operations used are not part of torch's public interface; where they are missing, no layer is
replaced.
"""

from __future__ import annotations

import functools
import logging
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swarmkit.models.kernels.choices import recall_choice, remember_choice
from swarmkit.models.kernels.compiled_products import may_be_faster
from swarmkit.models.kernels.few_rows import fastest_ways, multiply_rows, onednn_product
from swarmkit.models.kernels.replace_linear import (
    SMALLEST,
    can_be_replaced,
    gives_products,
    median_seconds,
    noise_rows,
    noise_weight,
    replace_linear,
)

logger = logging.getLogger(__name__)

_ROWS = 8  # oneDNN orders weights for so many rows; the order serves other numbers of rows as well
_TRIED_ROWS = (1, 3, 8, 33)
_FASTER = 1.1
_AS_FAST = 1.05
_CACHE_BYTES = 2**26
"""Bytes that are more than a processor's cache holds."""
_TRIALS = 9
_UNCACHED_TRIALS = 5
"""Fewer of those that read more than the cache holds: each is long, and servers wait for them to start."""
COMPARISON = 2
"""To be raised with each change of what is compared, or how: what was remembered before counts no more."""
_BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference that the order of additions may make, where values are about 1."""


class BlockedLinear(nn.Linear):
    """A frozen linear layer whose `weight`, `[out, in]`, is in oneDNN's order; `to_dense()` turns it back."""

    @classmethod
    def of(cls, layer: nn.Linear) -> BlockedLinear:
        """Make a layer with the values of another."""
        same = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        same.weight = nn.Parameter(in_blocks(layer.weight.detach()), requires_grad=False)
        same.bias = layer.bias
        return same.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            out: Tensor = _Multiply.apply(input, self.weight, self.bias)
            return out
        return onednn_product(input, self.weight, self.bias)


class _Multiply(torch.autograd.Function):
    """The product with frozen weights, and its gradient with respect to the input."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return onednn_product(given, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient @ ctx.weight.to_dense(), None, None


def use_blocked(model: nn.Module, will_compile: bool = False) -> int:
    """Replace large linear layers of a frozen model on a CPU where that is faster; returns how many.

    Args: will_compile: whether decode steps of the model will be compiled. Then weights stay plain for which
        compiled products of one row may be faster.
    """

    is_chosen = functools.cache(functools.partial(_is_chosen, will_compile=will_compile))  # it reads a file

    def make(layer: nn.Linear) -> BlockedLinear | None:
        weight = layer.weight
        if not can_be_replaced(layer) or weight.dtype not in _BOUND or weight.is_mkldnn:
            return None
        return BlockedLinear.of(layer) if is_chosen(weight.shape, weight.dtype) else None

    return replace_linear(model, make)


def compare_layouts(block: nn.Module, dtype: torch.dtype, will_compile: bool = False) -> set[torch.Size]:
    """Find out now which linear layers of a block `use_blocked` would replace: the shapes of their weights.

    A comparison takes the memory of two weights, or of `_CACHE_BYTES` if that is more; this is the time to
    have it while the model's own weights do not have it yet.

    Args:
        block: it may be on the meta device.
        dtype: of the weights that it will have.
        will_compile: see `use_blocked`.
    """
    large = {
        layer.weight.shape
        for layer in block.modules()
        if type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST and dtype in _BOUND
    }
    return {shape for shape in large if _is_chosen(shape, dtype, will_compile)}


def copy_for_a_while(weight: Tensor) -> Tensor:
    """A copy in memory of its own, which the system has back at once when the copy is let go.

    What an allocator was given back it keeps, for the same thread's next tensors; weights are read in other
    threads than they are replaced in, and those that were replaced would be held twice.
    """
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
    memory = mmap.mmap(-1, weight.nbytes, **flags)
    return torch.frombuffer(memory, dtype=weight.dtype).view(weight.shape).copy_(weight)


def _is_chosen(shape: torch.Size, dtype: torch.dtype, will_compile: bool) -> bool:
    """Whether weights of a shape, `[out, in]`, are to be blocked; see `use_blocked`."""
    threads = torch.get_num_threads()
    if will_compile and may_be_faster(shape, dtype, threads):
        return False
    return is_faster(shape[0], shape[1], dtype, threads)


@functools.cache
def is_faster(rows: int, columns: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether a blocked weight gives the same products, faster for several rows, and for one as fast.

    Which is faster is measured once on a machine. That the products are the same is checked in each process
    that is to use blocked weights.
    """
    question = f"blocked [{rows}, {columns}], {dtype}, {threads} threads, comparison {COMPARISON}"
    known = recall_choice(question)
    if known is False:
        return False
    try:
        weight = noise_weight(rows, columns, dtype)
        blocked = in_blocks(weight)
        if not gives_products(
            lambda given: onednn_product(given, blocked, None), weight, _TRIED_ROWS, _BOUND[dtype]
        ):
            logger.warning("blocked weights of %d x %d give other products here", rows, columns)
            return False
        if known is True:
            return True
        known = _is_measured_faster(weight, blocked, fastest_ways(rows, columns, dtype, threads))
    except (AttributeError, RuntimeError, TypeError) as error:  # too little memory to compare is one of them
        logger.info("there are no blocked weights here: %s", error)
        return False
    remember_choice(question, known)
    return known


def _is_measured_faster(weight: Tensor, blocked: Tensor, way_of: Sequence[str]) -> bool:
    """Args: way_of: how plain weights are multiplied, see `few_rows`."""
    given = noise_rows(_ROWS, weight)
    plain_s, blocked_s = measured_seconds(
        [lambda: multiply_rows(given, weight, None, way_of), lambda: onednn_product(given, blocked, None)]
    )
    if plain_s <= _FASTER * blocked_s:
        return False
    # A lone client's token is one row, and finds no weight in the cache. On processors without AVX512, one
    # row by a blocked weight was seen to take twice as long as by a plain one.
    one = given[:1]
    more = range(_CACHE_BYTES // weight.nbytes // 2 - 1)
    plain = [weight, *(weight.clone() for _ in more)]
    in_order = [blocked, *(in_blocks(weight) for _ in more)]
    plain_s, blocked_s = measured_seconds(
        [
            lambda: [multiply_rows(one, each, None, way_of) for each in plain],
            lambda: [onednn_product(one, each, None) for each in in_order],
        ],
        _UNCACHED_TRIALS,
    )
    return blocked_s <= _AS_FAST * plain_s


def measured_seconds(works: Sequence[Callable[[], object]], trials: int = _TRIALS) -> list[float]:
    """How long each takes, by trying."""
    return median_seconds(works, trials)


@torch.inference_mode(False)
@torch.no_grad()
def in_blocks(weight: Tensor) -> Tensor:
    """A weight [out, in] in the blocked order."""
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return blocked
