"""How likely the model finds the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from swarmkit.client.session.session import SwarmCache
from swarmkit.client.token_chances import TokenRecord, records
from swarmkit.models.architecture.anatomy import cache_argument

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM
    from swarmkit.client.session.session import Session

_PIECE_TOKENS = 256
"""Tokens of a prompt whose logits, `[tokens, vocabulary]`, are in memory at a time."""


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
