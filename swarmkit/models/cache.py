"""One session's keys and values for the blocks it uses on one stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from swarmkit.errors import UsageError


class StageCache(DynamicCache):
    """A transformers cache for blocks `[start, stop)` of a stage that may serve more than those.

    Every block keeps all tokens, also blocks with a sliding window: their masks hide what the window has left
    behind, and in return the cache can be cut back to any earlier token.

    Attributes:
        start, stop: the half-open range of blocks, counted in the whole model.
        offset: index of the first of them within the stage, which is how its attention modules count.
    """

    def __init__(self, start: int, stop: int, *, offset: int = 0) -> None:
        # Past DynamicCache.__init__, which would pick other kinds of layers by the model's config.
        Cache.__init__(self, layers=_empty(stop - start))
        self.start = start
        self.stop = stop
        self.offset = offset

    layers: list[Any]  # of DynamicLayer

    @property
    def tokens(self) -> int:
        """Tokens held, per row of the batch."""
        # The last block is filled last, so that during a step this still counts the tokens before it.
        keys = self.layers[-1].keys
        return 0 if keys is None else int(keys.shape[-2])

    @property
    def batch(self) -> int:
        """Rows of the batch; 0 while the cache is empty."""
        keys = self.layers[-1].keys
        return 0 if keys is None else int(keys.shape[0])

    def edit(self, keep_tokens: int, order: Sequence[int] | None = None) -> None:
        """First keep only the first `keep_tokens` tokens, then select rows of the batch.

        Args:
            keep_tokens: from 0 to `tokens`; nothing happens when it equals `tokens`.
            order: which present row each new row continues, of any length of at least one (beams may be
                repeated or dropped); None keeps all rows as they are. Ignored when no tokens are left.

        Raises:
            UsageError: there are fewer tokens than that, or a row does not exist. The cache is unchanged.
        """
        tokens, batch = self.tokens, self.batch
        if not 0 <= keep_tokens <= tokens:
            raise UsageError(f"Cannot keep {keep_tokens} tokens of a cache that holds {tokens}.")
        rows: list[int] | None = None
        if order is not None and keep_tokens:
            rows = [int(row) for row in order]
            if not rows or min(rows) < 0 or max(rows) >= batch:
                raise UsageError(f"Rows {rows} are not all within a batch of {batch}.")
            if rows == list(range(batch)):
                rows = None
        self.truncate(keep_tokens)
        if rows is not None:
            index = torch.tensor(rows, device=self.layers[0].keys.device)
            for layer in self.layers:
                layer.keys = layer.keys.index_select(0, index)
                layer.values = layer.values.index_select(0, index)

    def truncate(self, tokens: int) -> None:
        """Keep at most the first `tokens` tokens in each block."""
        if tokens == 0:
            self.clear()
            return
        for layer in self.layers:
            if layer.keys is not None and layer.keys.shape[-2] > tokens:
                # A view; the next step copies what is kept and frees the rest.
                layer.keys = layer.keys[..., :tokens, :]
                layer.values = layer.values[..., :tokens, :]

    def nbytes(self) -> int:
        """Bytes of the keys and values of the tokens held."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.keys is not None)

    def clear(self) -> None:
        """Forget everything and free its memory; the cache can be used again, also with another batch."""
        self.layers = _empty(len(self.layers))

    # What transformers asks of a cache while it runs. All blocks hold the same tokens, so questions about a
    # length need no block; and only `update` is asked by an attention module, in the stage's own counting.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer_idx - self.offset].update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self.layers)


def _empty(blocks: int) -> list[Any]:
    return [DynamicLayer() for _ in range(blocks)]  # type: ignore[no-untyped-call]
