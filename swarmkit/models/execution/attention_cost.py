"""What attention costs beside the linear layers: plain numbers, by which the engine cuts and shares work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

_TOKENS_PER_READ = 32
"""Reading a block's weights takes about as long as computing the block for so many tokens."""
_MOST_MASKED = 2**26
"""Entries of the mask of one step in one forward pass."""


@dataclass(frozen=True)
class AttentionCost:
    """Work in *tokens*: a token's way through the linear layers is 1, and attention comes on top of it.

    Attributes:
        reads: so many positions of one row take as long to read as the linear layers take for a token.
        products: so many positions that a token attends to take as long to compute.
    """

    reads: float = math.inf
    products: float = math.inf

    @classmethod
    def of(cls, config: Any, block: nn.Module) -> AttentionCost:
        """What it costs in a block with this config; nothing, where the config does not say enough."""
        heads = getattr(config, "num_attention_heads", None)
        parameters = list(block.parameters())
        if not heads or not parameters:
            return cls()
        shared = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        weights = sum(parameter.numel() for parameter in parameters)
        nbytes = sum(parameter.nbytes for parameter in parameters)
        position_bytes = 2 * shared * dim * max(parameter.element_size() for parameter in parameters)
        return cls(
            max(1.0, nbytes / (_TOKENS_PER_READ * position_bytes)), max(1.0, weights / (2 * heads * dim))
        )

    def work(self, rows: int, tokens: int, past: int) -> float:
        """The work of `tokens` new tokens of each of `rows` rows that hold `past` tokens."""
        read, computed = past + tokens, tokens * (past + tokens / 2)
        return rows * (tokens + read / self.reads + computed / self.products)

    def tokens_within(self, work: float, rows: int, past: int, most: int) -> int:
        """Most tokens per row, up to `most`, with which all `rows` rows are within this work; it may be 0."""

        def fits(tokens: int) -> bool:
            masked = rows * tokens * (past + tokens) <= _MOST_MASKED
            return masked and self.work(rows, tokens, past) <= work

        if fits(most):
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def rows_within(self, work: float, rows: int, tokens: int, past: int) -> int:
        """Most rows, up to `rows`, of which these tokens are within this work; 0 if not one is."""
        return min(rows, int(work / self.work(1, tokens, past)))
