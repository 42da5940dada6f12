"""What tests of clients share: prompts, ways to generate, and callbacks at a chosen token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..models.tiny import VOCABULARY


def prompt(*lengths: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Random ids and mask `[batch, max(lengths)]`, padded on the left."""
    longest = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask


def answer(
    model: Any, ids: Tensor, mask: Tensor | None = None, *, new_tokens: int = 12, **options: Any
) -> Any:
    """`generate()` of exactly `new_tokens`, seeded.

    Random models may wish to end at once, or to say two tokens for ever, which would hide many a mistake.
    """
    torch.manual_seed(11)
    options = {"do_sample": False, "no_repeat_ngram_size": 2, **options}
    if mask is None:
        mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options
    )


class _At(LogitsProcessor):  # type: ignore[misc]
    """Calls each action once, after the step behind the given number of new tokens."""

    def __init__(self, actions: dict[int, Callable[[], object]]) -> None:
        self._actions = dict(actions)
        self._prompt_tokens: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompt_tokens is None:
            self._prompt_tokens = input_ids.shape[1]
        action = self._actions.pop(input_ids.shape[1] - self._prompt_tokens, None)
        if action is not None:
            action()
        return scores


def at(actions: dict[int, Callable[[], object]]) -> LogitsProcessorList:
    """Logits processors that call `actions[n]` once the model has seen n new tokens, before its next step."""
    return LogitsProcessorList([_At(actions)])
