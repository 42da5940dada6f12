"""How a few rows are multiplied by a weight together, where that is faster than one by one.

Together each weight is read once for all rows. Where the arithmetic takes the time and not the reading, as
with bfloat16 on processors that have no instructions for it, that brings nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from swarmkit.models.kernels.choices import recall_choice, remember_choice
from swarmkit.models.kernels.cut_linear import (
    CUTS,
    cut_product,
    fastest_cuts,
    measured_seconds,
    tried_outputs,
)
from swarmkit.models.kernels.replace_linear import SMALLEST

_ROWS = 4
_FASTER = 1.2
COMPARISON = 1
"""To be raised with each change of what is compared, or how: what was remembered before counts no more."""

_choosing = threading.Lock()


def multiply_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, cut_of: Sequence[int]) -> Tensor:
    """The product of `rows` [rows, in] with a weight [out, in], and the bias [out], without gradients.

    It is torch's own but for the order of additions.

    Args: cut_of: for each number of rows, outputs of one part of the product (`CutLinear`); 0 or none: one
        part.
    """
    cut = cut_of[len(rows)] if len(rows) < len(cut_of) else 0
    if not cut or not weight.is_contiguous():
        return functional.linear(rows, weight, bias)
    return cut_product(rows, weight, cut, bias)


@functools.cache
def cuts_together(outputs: int, inputs: int, dtype: torch.dtype, threads: int) -> Sequence[int] | None:
    """The `cut_of` with which a few rows by a weight [outputs, inputs] take less time together than one by
    one; None: they do not.

    It is measured once on a machine, which takes some tenths of a second; other threads wait for that.
    """
    if outputs * inputs < SMALLEST:
        return None
    question = f"together [{outputs}, {inputs}], {dtype}, {threads} threads, comparison {COMPARISON}"
    with _choosing:
        cut_of = fastest_cuts(outputs, inputs, threads) if dtype is torch.float32 else ()
        known = recall_choice(question)
        if not isinstance(known, bool):
            known = _is_measured_faster(outputs, inputs, dtype, cut_of)
            remember_choice(question, known)
    return cut_of if known else None


@torch.inference_mode()
def _is_measured_faster(outputs: int, inputs: int, dtype: torch.dtype, cut_of: Sequence[int]) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(tried_outputs(outputs, inputs, max(CUTS)), inputs, generator=generator).to(dtype)
    rows = torch.randn(_ROWS, inputs, generator=generator).to(dtype)
    alone_s, together_s = measured_seconds(
        [
            lambda: [functional.linear(row[None], weight) for row in rows],
            lambda: multiply_rows(rows, weight, None, cut_of),
        ]
    )
    return alone_s > _FASTER * together_s
