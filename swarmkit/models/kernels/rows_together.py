"""How a few rows are multiplied by a weight together, where that is faster than one by one.

Together each weight is read once for all rows. Where the arithmetic takes the time and not the reading, as
with bfloat16 on processors that have no instructions for it, that brings nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch

from swarmkit.models.kernels.choices import recall_choice, remember_choice
from swarmkit.models.kernels.few_rows import (
    CUTS,
    fastest_ways,
    measured_seconds,
    multiply_rows,
    tried_outputs,
)
from swarmkit.models.kernels.replace_linear import SMALLEST, noise_rows, noise_weight

_ROWS = 4
_FASTER = 1.2
COMPARISON = 2
"""To be raised with each change of what is compared, or how: what was remembered before counts no more."""

_choosing = threading.Lock()


@functools.cache
def ways_together(outputs: int, inputs: int, dtype: torch.dtype, threads: int) -> Sequence[str] | None:
    """The ways in which a few rows by a weight [outputs, inputs] take less time together than one by one;
    None: they do not.

    It is measured once on a machine, which takes some tenths of a second; other threads wait for that.
    """
    if outputs * inputs < SMALLEST:
        return None
    question = f"together [{outputs}, {inputs}], {dtype}, {threads} threads, comparison {COMPARISON}"
    way_of = fastest_ways(outputs, inputs, dtype, threads)
    with _choosing:
        known = recall_choice(question)
        if not isinstance(known, bool):
            known = _is_measured_faster(outputs, inputs, dtype, way_of)
            remember_choice(question, known)
    return way_of if known else None


@torch.inference_mode()
def _is_measured_faster(outputs: int, inputs: int, dtype: torch.dtype, way_of: Sequence[str]) -> bool:
    weight = noise_weight(tried_outputs(outputs, inputs, max(CUTS)), inputs, dtype)
    rows = noise_rows(_ROWS, weight)
    alone_s, together_s = measured_seconds(
        [
            lambda: [multiply_rows(row[None], weight, None, way_of) for row in rows],
            lambda: multiply_rows(rows, weight, None, way_of),
        ]
    )
    return alone_s > _FASTER * together_s
