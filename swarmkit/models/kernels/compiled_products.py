"""Whether compiled products of one row were faster on this machine than those of matrix libraries.

A server that has its decode steps compiled finds that out for the weights that it serves (`StepCompiler`).
Until then they may be. Where they are, weights stay in the order in which a loop reads them.
"""

from __future__ import annotations

import torch

from swarmkit.models.kernels.choices import recall_choice, remember_choice

COMPARISON = 1
"""To be raised with each change of what is compared, or how: what was remembered before counts no more."""


def may_be_faster(shape: torch.Size, dtype: torch.dtype, threads: int) -> bool:
    """Whether they were faster with weights of this shape, `[out, in]`, or have not been tried."""
    return recall_choice(_question(shape, dtype, threads)) is not False


def remember_faster(shape: torch.Size, dtype: torch.dtype, threads: int, faster: bool) -> None:
    """Remember whether they were."""
    remember_choice(_question(shape, dtype, threads), faster)


def _question(shape: torch.Size, dtype: torch.dtype, threads: int) -> str:
    return f"compiled [{shape[0]}, {shape[1]}], {dtype}, {threads} threads, comparison {COMPARISON}"
