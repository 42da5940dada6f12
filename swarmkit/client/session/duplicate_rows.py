"""Rows of a first step that are the same prompt.

`generate()` repeats each prompt for every beam or answer, and would have all of them computed. A session has
each computed once, and repeats its row on the servers, which then keep its pages once too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DuplicateRows:
    """Which rows of a batch are repetitions of others."""

    first: Sequence[int]
    """The rows that repeat no other."""
    order: Sequence[int]
    """The index in `first` of each row of the batch."""


def alike_rows(hidden: Tensor, *others: Tensor | None) -> DuplicateRows | None:
    """Find the rows that equal the one before them, to the last bit; None if there are none.

    Args:
        hidden: `[batch, tokens, hidden]`
        others: what else goes with each row, `[batch, tokens]`.
    """
    if hidden.shape[0] == 1:
        return None
    differs = torch.ones(hidden.shape[0], dtype=torch.bool)
    differs[1:] = False
    for part in (hidden, *others):
        if part is not None:
            differs[1:] |= (part[1:] != part[:-1]).flatten(1).any(dim=1)
    if bool(differs.all()):
        return None
    return DuplicateRows(differs.nonzero().flatten().tolist(), (differs.cumsum(0) - 1).tolist())
