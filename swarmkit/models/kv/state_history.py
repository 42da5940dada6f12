"""Earlier states of recurrent blocks, so that a session can be cut back.

A block with linear attention or a convolution has a *state* instead of keys and values, of a size of its own
however long the session is, and it cannot be cut back. So two earlier states (*marks*) are kept, and the
stage's inputs since the beginning. Cut back to a token in between, the blocks stand at the earlier state, and
the stage runs the inputs in between again before the next step::

    0 ──────── mark ──────── mark ────────── now
                 └─ inputs run again ─> wanted

Marks are set before every step of several tokens, and every 64 tokens, so that speculative decoding goes back
one step and no further.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from swarmkit.models.kv.contiguous import nbytes_of

MARKS = 2
"""Earlier states that are kept."""
_MARK_EVERY_TOKENS = 64


@dataclass
class _Mark:
    """The states of the recurrent blocks as they were after `tokens` tokens."""

    tokens: int
    layers: dict[int, Any]


class StateHistory:
    """What one session needs to go back in its recurrent blocks."""

    def __init__(self, blocks: Sequence[int]) -> None:
        """Args: blocks: indices of the recurrent blocks among the session's cache layers."""
        self._blocks = blocks
        self._marks: list[_Mark] = []
        self._inputs: Tensor | None = None
        self._positions: Tensor | None = None
        self._mark_next = False

    @property
    def marks(self) -> list[int]:
        """Tokens after which states are kept."""
        return [mark.tokens for mark in self._marks]

    @property
    def nbytes(self) -> int:
        """Bytes of earlier states, inputs and positions."""
        states = sum(nbytes_of(layer) for mark in self._marks for layer in mark.layers.values())
        return states + sum(part.nbytes for part in (self._inputs, self._positions) if part is not None)

    def before_step(self, layers: Sequence[Any], tokens: int, new_tokens: int) -> None:
        """Keep the present states if a step of `new_tokens`, behind `tokens`, makes that worthwhile."""
        last = self._marks[-1].tokens if self._marks else 0
        wanted = new_tokens > 1 or self._mark_next
        if tokens > last and (wanted or tokens - last >= _MARK_EVERY_TOKENS):
            states = {index: _copy_of_states(layers[index]) for index in self._blocks}
            self._marks = [*self._marks, _Mark(tokens, states)][-MARKS:]

    def after_step(self, hidden: Tensor, position_ids: Tensor | None, past: int) -> None:
        """Keep the inputs of a step, `hidden` [batch, tokens, hidden] behind `past` tokens."""
        batch, tokens, _ = hidden.shape
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=hidden.device)[None]
        position_ids = position_ids.to(hidden.device).expand(batch, tokens)
        if self._inputs is None or self._positions is None:
            self._inputs, self._positions = hidden.clone(), position_ids
        else:
            self._inputs = torch.cat([self._inputs, hidden], dim=1)
            self._positions = torch.cat([self._positions, position_ids], dim=1)
        self._mark_next = tokens > 1

    def between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs [batch, tokens, hidden] and position ids [batch, tokens] of tokens [start, stop)."""
        assert self._inputs is not None
        assert self._positions is not None
        return self._inputs[:, start:stop], self._positions[:, start:stop]

    def restore(self, layers: list[Any], tokens: int) -> int:
        """Put the recurrent layers back to the last mark at or before `tokens`, and forget what is behind.

        Returns: the tokens of that mark; 0 if there is none, and the layers are unchanged.
        """
        self._marks = [mark for mark in self._marks if mark.tokens <= tokens]
        self._mark_next = True  # lest the same tokens be run again
        if self._inputs is not None and self._positions is not None:
            self._inputs, self._positions = self._inputs[:, :tokens], self._positions[:, :tokens]
        if not self._marks:
            return 0
        for index, marked in self._marks[-1].layers.items():
            old, new = layers[index], _copy_of_states(marked)
            if isinstance(old, DynamicLayer):
                # A block with both attention and a state: the keys stay, and are cropped like all others.
                new.keys, new.values, new.is_initialized = old.keys, old.values, old.is_initialized
            layers[index] = new
        return self._marks[-1].tokens

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        index: Any = torch.tensor(rows)
        for mark in self._marks:
            for layer in mark.layers.values():
                LinearAttentionCacheLayerMixin.reorder_cache(layer, index)
        if self._inputs is not None and self._positions is not None:
            index = index.to(self._inputs.device)
            self._inputs = self._inputs.index_select(0, index)
            self._positions = self._positions.index_select(0, index)


def _copy_of_states(layer: Any) -> Any:
    """A copy of a recurrent layer, without the keys and values that it may have besides."""
    same = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(same, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()})
    if isinstance(same, DynamicLayer):
        same.keys = same.values = None
    return same
