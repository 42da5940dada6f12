"""How likely the model found each token that it made, and what it found likely in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor


@dataclass(frozen=True)
class TokenChance:
    """A token, and the logarithm of its probability (before temperature, bias and the like)."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenRecord:
    """A token of the answer with the likeliest ones in its place, likeliest first.

    Attributes:
        offset: where its text begins, in characters of the answer.
    """

    chosen: TokenChance
    likeliest: tuple[TokenChance, ...]
    offset: int = 0


class ChanceRecorder(LogitsProcessor):
    """Remembers what the model itself finds likely; to be the first of the processors."""

    def __init__(self, count: int, decode: Callable[[Sequence[int]], str]) -> None:
        """Record.

        Args: count: how many of the likeliest tokens are told.
        """
        self._count = count
        self._decode = decode
        self._logits: dict[int, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logits[input_ids.shape[1]] = scores
        return scores

    def take(self, position: int, tokens: Sequence[int]) -> list[TokenRecord]:
        """The records of the tokens at a position, row by row."""
        chances = torch.log_softmax(self._logits.pop(position).float(), dim=-1)
        return records(chances, tokens, self._count, self._decode)


def records(
    chances: torch.Tensor, tokens: Sequence[int], count: int, decode: Callable[[Sequence[int]], str]
) -> list[TokenRecord]:
    """Tokens with their chances.

    Args: chances: logarithms of probabilities, `[tokens, vocabulary]`.
    """
    values, ids = chances.topk(count, dim=-1) if count else (chances[:, :0], chances[:, :0].long())
    return [
        TokenRecord(
            TokenChance(token, decode([token]), float(row[token])),
            tuple(
                TokenChance(other, decode([other]), value)
                for other, value in zip(best.tolist(), likeliest.tolist(), strict=True)
            ),
        )
        for token, row, best, likeliest in zip(tokens, chances, ids, values, strict=True)
    ]
