"""One session's cache for the blocks that it uses on one stage.

It is in one of three layouts (see `layout`), and moves between them::

                    one row is chosen twice                      a slot is free
    paged rows <──────────────────────────── contiguous rows ────────────────────> static slot
               ────────────────────────────>                 <────────────────────
                    one row is left                              it grows longer, or rows are chosen
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from swarmkit.errors import UsageError
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.models.kv.contiguous import ContiguousRows, empty_layers
from swarmkit.models.kv.layout import KeysAndValues, KVLayout
from swarmkit.models.kv.page_table import PAGE_TOKENS as PAGE_TOKENS
from swarmkit.models.kv.page_table import pages_for
from swarmkit.models.kv.paged_rows import PagedRows
from swarmkit.models.kv.state_history import StateHistory
from swarmkit.models.kv.static_slots import StaticSlot, StaticSlots


class StageCache(DynamicCache):
    """A transformers cache for blocks `[start, stop)` of a stage that may serve more than those.

    Every attention block keeps all tokens, also with a sliding window: its mask hides what the window has
    left behind, and in return the cache can be cut back to any earlier token. Blocks with linear attention or
    a convolution can be cut back because of their `StateHistory`; the stage then runs some inputs again
    before the next step (see `missing`).

    Attributes:
        start, stop: the half-open range of blocks, counted in the whole model.
        offset: index of the first of them within the stage, which is how its attention modules count.
        tokens: tokens held, per row of the batch.
        batch: rows of the batch; 0 while the cache is empty.
        slot: the static slot that the session is in; None in another layout.
        adapter: the adapter that all that it holds was computed with.
        history: earlier states of the recurrent blocks; None if there are none.
    """

    layers: list[Any]
    is_some_rows = False
    """Whether it is some rows of a session's cache; see `rows`."""

    def __init__(self, start: int, stop: int, *, offset: int = 0, config: PreTrainedConfig) -> None:
        """An empty cache; `config` describes exactly blocks `[start, stop)`."""
        self._kinds = empty_layers(config)
        # Blocks of the stage that this session does not use come first, so that indices are the stage's.
        self._unused = [DynamicLayer() for _ in range(offset)]  # type: ignore[no-untyped-call]
        Cache.__init__(self, layers=[*self._unused, *copy.deepcopy(self._kinds)])
        self.start = start
        self.stop = stop
        self.offset = offset
        self.adapter: Adapter | None = None
        self._recurrent = [
            offset + index
            for index, layer in enumerate(self._kinds)
            if isinstance(layer, LinearAttentionCacheLayerMixin)
        ]
        self.clear()

    @property
    def blocks(self) -> list[Any]:
        """The layers of this cache's own blocks."""
        return self.layers[self.offset :]

    @property
    def recurrent(self) -> bool:
        """Whether some block has a state that is not made of tokens."""
        return bool(self._recurrent)

    @property
    def has_keys(self) -> bool:
        """Whether some block has keys and values of tokens."""
        return any(isinstance(layer, DynamicLayer) for layer in self._kinds)

    # What the session does between steps.

    def edit(self, keep_tokens: int, order: Sequence[int] | None = None) -> None:
        """First keep only the first `keep_tokens` tokens, then select rows of the batch.

        Args:
            keep_tokens: from 0 to `tokens`; nothing happens when it equals `tokens`.
            order: which present row each new row continues, of any length of at least one (beams may be
                repeated or dropped); None keeps all rows as they are. Ignored when no tokens are left.

        Raises:
            UsageError: there are fewer tokens than that, or a row does not exist. The cache is unchanged.
        """
        if not 0 <= keep_tokens <= self.tokens:
            raise UsageError(f"Cannot keep {keep_tokens} tokens of a cache that holds {self.tokens}.")
        rows: list[int] | None = None
        if order is not None and keep_tokens:
            rows = [int(row) for row in order]
            if not rows or min(rows) < 0 or max(rows) >= self.batch:
                raise UsageError(f"Rows {rows} are not all within a batch of {self.batch}.")
            if rows == list(range(self.batch)):
                rows = None
        if keep_tokens < self.tokens:
            self.rewind(keep_tokens)
        if rows is not None:
            self._select(rows)

    def clear(self) -> None:
        """Forget everything and free its memory; the cache can be used again, also with another batch."""
        self.tokens = self.batch = self._computed = 0
        self.prompt_order: Sequence[int] | None = None
        self.history = StateHistory(self._recurrent) if self._recurrent else None
        self._use(ContiguousRows(copy.deepcopy(self._kinds)))

    def nbytes(self) -> int:
        """Bytes of all that is held for the session: keys, values, states, and what is kept to go back.

        Of shared pages all that they take; of rooms without what is empty behind the tokens.
        """
        return self._layout.nbytes + (0 if self.history is None else self.history.nbytes)

    def pages_held(self) -> int:
        """Pages (of one row, in all blocks) that it takes memory for, also where they are empty."""
        return self._layout.pages

    def pages_after(self, keep_tokens: int, order: Sequence[int] | None, rows: int, tokens: int) -> int:
        """Most pages that it takes memory for until a step is done: `edit`, and then `tokens` new tokens.

        With shared pages every row starts on pages of its own at most, and one block's keys and values are
        gathered for the attention: however often a row is repeated, that is within what is returned here.

        Args: rows: of the step; keep_tokens and order: such as `edit` takes.
        """
        pages = pages_for(keep_tokens + tokens)
        if rows == 1 or not keep_tokens:
            return rows * pages
        held = self._layout.shared_pages(order, keep_tokens)
        if held is None:
            return rows * pages
        most = min(rows * pages, held + rows * (pages - keep_tokens // PAGE_TOKENS))
        return max(held, most) + -(-rows * pages // len(self.blocks))

    # Pages: keys and values of `PAGE_TOKENS` tokens of one row, from a multiple of that on.

    @property
    def has_pages(self) -> bool:
        """Whether all that it holds is keys and values of tokens, which no rows share."""
        return self._layout.has_pages

    @torch.inference_mode()
    def page(self, index: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """A copy of keys and values [rows, heads, PAGE_TOKENS, dim] in each block."""
        tokens = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
        return tuple(
            (layer.keys[..., tokens, :].clone(), layer.values[..., tokens, :].clone())
            for layer in self.blocks
        )

    @torch.inference_mode()
    def append(self, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hold more tokens of one row; keys and values of each block are [1, heads, tokens, dim]."""
        self._reserve(self.tokens + states[0][0].shape[-2])
        for layer, (keys, values) in zip(self.blocks, states, strict=True):
            layer.update(keys, values)
        self._hold(1, self.tokens + states[0][0].shape[-2])

    # Keys and values that another server has computed for the same session.

    @torch.inference_mode()
    def states(self, block: int, low: int, high: int) -> KeysAndValues:
        """Keys and values [rows, heads, high - low, dim] of tokens [low, high) in a block, where they lie.

        Args: block: counted from `start`. Only while `has_pages`.
        """
        layer = self.blocks[block]
        return layer.keys[..., low:high, :], layer.values[..., low:high, :]

    def hold_rooms(self, rooms: Sequence[KeysAndValues], rows: int, tokens: int) -> None:
        """Forget everything, and hold the first `tokens` tokens of these rooms.

        Args: rooms: of each block, [rows, heads, tokens of whole pages, dim].
        """
        self.clear()
        self._use(ContiguousRows.of(rooms, rows, tokens))
        self._hold(rows, tokens)

    def acquire_slot(self, slots: StaticSlots) -> StaticSlot | None:
        """Move to a static slot, if this session can and one is free. Nothing else changes.

        Returns: the slot that it is in now, if any.
        """
        if self.slot is None and self.batch == 1 and 0 < self.tokens < slots.length and self.has_pages:
            row = slots.take(self.offset, self.blocks, self.tokens)
            if row is not None:
                self._use(row, row.slot)
        return self.slot

    def leave_slot(self) -> None:
        """Move to memory of its own, if the session is in a static slot."""
        if self.slot is not None:
            self._use(ContiguousRows.of(self._layout.into_rooms(), self.batch, self.tokens))

    # What the stage does around a step.

    def missing(self) -> tuple[Tensor, Tensor] | None:
        """Inputs [batch, tokens, hidden] and position ids that must be run again before the next step."""
        if self._computed == self.tokens:
            return None
        assert self.history is not None
        return self.history.between(self._computed, self.tokens)

    def caught_up(self, tokens: int) -> None:
        """Note that `tokens` of the missing tokens were run again."""
        self._computed += tokens

    def before_step(self, tokens: int) -> None:
        """Have room for a step of `tokens` new tokens."""
        self._reserve(self.tokens + tokens)
        if self.history is not None and self.tokens:
            self.history.before_step(self.layers, self.tokens, tokens)

    def after_step(self, hidden: Tensor, position_ids: Tensor | None) -> None:
        """Hold the tokens of a step that has run over `hidden` [batch, tokens, hidden]."""
        if self.history is not None:
            self.history.after_step(hidden, position_ids, self.tokens)
        self._hold(hidden.shape[0], self.tokens + hidden.shape[1])

    # A step over some rows at a time: `begin_rows`, then `rows` until all have had their turn, `end_rows`.

    @property
    def cuts_rows(self) -> bool:
        """Whether the next step may run over some of the rows at a time."""
        layout = self._layout
        cuts = isinstance(layout, PagedRows) or (isinstance(layout, ContiguousRows) and layout.has_pages)
        return cuts and self.tokens > 0

    def begin_rows(self, tokens: int) -> None:
        """Have room for a step of `tokens` new tokens of each row."""
        self._reserve(self.tokens + tokens)
        if isinstance(self._layout, ContiguousRows):
            self._layout.make_rooms(self.tokens + tokens)

    def rows(self, first: int, last: int) -> CacheRows:
        """Rows [first, last) as a cache, to which the step's tokens of these rows are appended once."""
        assert isinstance(self._layout, ContiguousRows | PagedRows)
        return CacheRows(self, first, last, self._layout.layers_of(first, last))

    def end_rows(self, tokens: int) -> None:
        """Hold the `tokens` new tokens, which have been appended to all rows."""
        if isinstance(self._layout, ContiguousRows):
            self._layout.fill_rooms(self.tokens + tokens)
        self._hold(self.batch, self.tokens + tokens)

    def rewind(self, tokens: int) -> None:
        """Stand at the first `tokens` tokens, whatever the blocks hold: a step may have ended half-way."""
        if tokens == 0:
            self.clear()
            return
        self.tokens = self._computed = tokens
        if self.history is not None:
            self._computed = self.history.restore(self.layers, tokens)
            if not self._computed:
                self._use(ContiguousRows(copy.deepcopy(self._kinds), self.batch, tokens))
                return
            self._layout.layers = self.blocks
        self._layout.crop(self._computed)

    def _reserve(self, tokens: int) -> None:
        if not self._layout.reserve(tokens):
            self._use(ContiguousRows.of(self._layout.into_rooms(), self.batch, self.tokens))
            self._layout.reserve(tokens)

    def _hold(self, rows: int, tokens: int) -> None:
        self.tokens = self._computed = tokens
        self.batch = rows
        self._layout.hold(rows, tokens)

    def _use(self, layout: KVLayout, slot: StaticSlot | None = None) -> None:
        self._layout = layout
        self.slot = slot
        self.layers = [*self._unused, *layout.layers]

    def _select(self, rows: list[int]) -> None:
        layout, rows_before = self._layout, rows
        self.layers = []  # so that what a layout gives up is freed block by block
        try:
            if self.slot is not None:
                layout = ContiguousRows.of(layout.into_rooms(), self.batch, self.tokens)
            if len(set(rows)) < len(rows) and layout.has_pages:
                chosen = sorted(set(rows))
                layout, rows = PagedRows.of(layout.layers, chosen), [chosen.index(row) for row in rows]
            layout.select(rows)
            if len(rows) == 1 and isinstance(layout, PagedRows):
                layout = ContiguousRows.of(layout.into_rooms(), 1, self.tokens)
        except BaseException:
            self.clear()  # some blocks have changed and some have not
            raise
        if self.history is not None:
            self.history.select(rows)
        if self.adapter is not None and self.adapter.spec.prompt_rows:
            before = self.prompt_order
            self.prompt_order = rows_before if before is None else [before[row] for row in rows_before]
        self.batch = len(rows)
        layout.hold(self.batch, self.tokens)
        self._use(layout)

    # What transformers asks of a cache while it runs: all blocks hold the same tokens, so that a length needs
    # no block, and still is that of the beginning of the step.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._computed

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._computed

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._computed + query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self.layers)


class CacheRows(StageCache):
    """Some rows of a session's cache during one step. What they hold is the session's, which begins and ends
    the step, and goes back if it fails.
    """

    is_some_rows = True

    def __init__(self, cache: StageCache, first: int, last: int, layers: list[Any]) -> None:
        """Args: layers: those of the session's blocks, for these rows."""
        self.__dict__.update(cache.__dict__)
        self.batch = last - first
        self.layers = [*cache._unused, *layers]

    def before_step(self, tokens: int) -> None:
        """The session has made room."""

    def after_step(self, hidden: Tensor, position_ids: Tensor | None) -> None:
        """The session holds the tokens when all of its rows have them."""

    def rewind(self, tokens: int) -> None:
        """The session goes back."""

    def acquire_slot(self, slots: StaticSlots) -> StaticSlot | None:
        return None
