"""Probabilities of tokens: of those that the model makes, and of those of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

from swarmkit.api.rows import TokenChance, TokenRecord
from swarmkit.client.session.session import SwarmCache
from swarmkit.models.architecture.anatomy import cache_argument

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.client.session.session import Session

_PIECE_TOKENS = 256
"""Tokens of a prompt whose logits, `[tokens, vocabulary]`, are in memory at a time."""


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


@torch.no_grad()
def prompt_records(
    model: SwarmModelForCausalLM,
    session: Session,
    prompt: Sequence[int],
    count: int,
    decode: Callable[[Sequence[int]], str],
) -> list[TokenRecord]:
    """The tokens of a prompt from the second on, with the chances that the model gave them."""
    cache = {cache_argument(type(model)): SwarmCache(session)}
    ids = torch.tensor([list(prompt)], device=model.device)
    found: list[TokenRecord] = []
    for start in range(0, len(prompt), _PIECE_TOKENS):
        piece = ids[:, start : start + _PIECE_TOKENS]
        logits = model(input_ids=piece, use_cache=True, **cache).logits[0]
        following = list(prompt[start + 1 : start + 1 + len(logits)])
        chances = torch.log_softmax(logits[: len(following)].float(), dim=-1)
        found += records(chances, following, count, decode)
    return found
