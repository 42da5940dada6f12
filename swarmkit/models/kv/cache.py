"""One session's keys and values for the blocks it uses on one stage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from swarmkit.errors import UsageError
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.models.kv.page_table import PAGE_TOKENS as PAGE_TOKENS
from swarmkit.models.kv.page_table import pages_for
from swarmkit.models.kv.paged_rows import PagedRows
from swarmkit.models.kv.static_slots import StaticSlot, StaticSlotLayer, StaticSlots

_MARK_EVERY_TOKENS = 64
MARKS = 2
"""Earlier states of the recurrent blocks that a cache keeps."""


@dataclass
class _Mark:
    """The states of the recurrent blocks as they were after `tokens` tokens."""

    tokens: int
    layers: dict[int, Any]


class StageCache(DynamicCache):
    """A transformers cache for blocks `[start, stop)` of a stage that may serve more than those.

    Every attention block keeps all tokens, also with a sliding window: its mask hides what the window has
    left behind, and in return the cache can be cut back to any earlier token.

    A block with linear attention or a convolution has a *state* instead, which cannot be cut back. A cache
    with such blocks remembers two earlier states and the stage's inputs since the beginning; cut back to a
    token between, it stands at the earlier state, and the stage runs the inputs in between again before the
    next step (see `missing`). Marks are set before every step of several tokens, and every 64 tokens, so that
    speculative decoding goes back one step and no further.

    Where all blocks have keys and values only, rows that were chosen twice share pages (see `paged_rows`).

    Attributes:
        start, stop: the half-open range of blocks, counted in the whole model.
        offset: index of the first of them within the stage, which is how its attention modules count.
        tokens: tokens held, per row of the batch.
        batch: rows of the batch; 0 while the cache is empty.
    """

    layers: list[Any]

    def __init__(self, start: int, stop: int, *, offset: int = 0, config: PreTrainedConfig) -> None:
        """An empty cache; `config` describes exactly blocks `[start, stop)`."""
        self._kinds = _layers_for(config)
        # Blocks of the stage that this session does not use come first, so that indices are the stage's.
        self._unused = [DynamicLayer() for _ in range(offset)]  # type: ignore[no-untyped-call]
        Cache.__init__(self, layers=[*self._unused, *copy.deepcopy(self._kinds)])
        self.start = start
        self.stop = stop
        self.offset = offset
        self.tokens = 0
        self.batch = 0
        self._computed = 0
        self._recurrent = [
            offset + index
            for index, layer in enumerate(self._kinds)
            if isinstance(layer, LinearAttentionCacheLayerMixin)
        ]
        self._marks: list[_Mark] = []
        self._inputs: Tensor | None = None
        self._positions: Tensor | None = None
        self._mark_next = False
        self._paged: PagedRows | None = None
        self.seat: StaticSlot | None = None
        """Where it sits, while it does; see `acquire_slot`."""
        self._room_pages = 0
        """Pages that each row has room for, while it has a room of its own."""
        self.adapter: Adapter | None = None
        """With which all that it holds was computed."""

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
        self.layers = [*self._unused, *copy.deepcopy(self._kinds)]
        self.tokens = self.batch = self._computed = 0
        self._marks = []
        self._inputs = self._positions = None
        self._mark_next = False
        self._paged = self.seat = None
        self._room_pages = 0

    def nbytes(self) -> int:
        """Bytes of all that is held for the session: keys, values, states, and what is kept to go back.

        Of shared pages all that they take; of rooms without what is empty behind the tokens.
        """
        held = self._paged.nbytes if self._paged else sum(_nbytes(layer) for layer in self.blocks)
        held += sum(_nbytes(layer) for mark in self._marks for layer in mark.layers.values())
        return held + sum(part.nbytes for part in (self._inputs, self._positions) if part is not None)

    def pages_held(self) -> int:
        """Pages (of one row, in all blocks) that it takes memory for, also where they are empty."""
        return self._paged.table.slots if self._paged else self.batch * self._room_pages

    def pages_after(self, keep_tokens: int, order: Sequence[int] | None, rows: int, tokens: int) -> int:
        """How many those are at most until a step has been taken: `edit`, and then so many new tokens.

        With shared pages at most every row starts on pages of its own, and one block's keys and values are
        gathered for the attention: however often a row is repeated, that is within what is told here.

        Args: rows: of the step; keep_tokens and order: such as `edit` takes.
        """
        pages = pages_for(keep_tokens + tokens)
        shares = self._paged is not None or (order is not None and self._shares(order))
        if rows == 1 or not keep_tokens or not shares:
            return rows * pages
        held = self._paged.table.slots if self._paged else len(set(order or ())) * pages_for(keep_tokens)
        most = min(rows * pages, held + rows * (pages - keep_tokens // PAGE_TOKENS))
        return max(held, most) + -(-rows * pages // len(self.blocks))

    # Pages: keys and values of `PAGE_TOKENS` tokens of one row, from a multiple of that on.

    @property
    def has_pages(self) -> bool:
        """Whether all that it holds is keys and values of tokens."""
        return all(isinstance(layer, _GrowingLayer | StaticSlotLayer) for layer in self.blocks)

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
        for layer, (keys, values) in zip(self.blocks, states, strict=True):
            layer.update(keys, values)
        self.tokens += states[0][0].shape[-2]
        self._computed = self.tokens
        self.batch = 1
        self._room_pages = pages_for(self.tokens)
        if self.seat is not None:
            self.seat.tokens = self.tokens

    # A seat: keys and values of one row where recorded work finds them (see `seats`).

    def acquire_slot(self, seats: StaticSlots) -> StaticSlot | None:
        """Have a seat, if this session can and one is free. Nothing changes but where it keeps its tokens."""
        if self.seat is None and self.batch == 1 and 0 < self.tokens < seats.length:
            may = all(isinstance(layer, _GrowingLayer) for layer in self.blocks)
            taken = seats.take(self.offset, self.blocks, self.tokens) if may else None
            if taken is not None:
                self.seat, self.layers[self.offset :] = taken
        return self.seat

    def _stand_up(self) -> None:
        """Have rooms of its own again."""
        if self.seat is not None:
            tokens = pages_for(self.tokens) * PAGE_TOKENS
            for index, layer in enumerate(self.blocks, start=self.offset):
                keys, values = (_room(part, tokens) for part in (layer.keys, layer.values))
                self.layers[index] = _GrowingLayer.of((keys, values), self.tokens)
            self.seat = None

    # What the stage does around a step.

    def missing(self) -> tuple[Tensor, Tensor] | None:
        """Inputs [batch, tokens, hidden] and position ids that must be run again before the next step."""
        if self._computed == self.tokens:
            return None
        inputs, positions = self._inputs, self._positions
        assert inputs is not None
        assert positions is not None
        return inputs[:, self._computed : self.tokens], positions[:, self._computed : self.tokens]

    def caught_up(self, tokens: int) -> None:
        """So many of the missing tokens were run again."""
        self._computed += tokens

    def before_step(self, tokens: int) -> None:
        """A step of `tokens` new tokens is about to run."""
        if self.seat is not None and self.tokens + tokens > self.seat.length:
            self._stand_up()
        if self._paged:
            self._paged.reserve(tokens)
        else:
            self._room_pages = max(self._room_pages, pages_for(self.tokens + tokens))
        if not self._recurrent or not self.tokens:
            return
        last = self._marks[-1].tokens if self._marks else 0
        wanted = tokens > 1 or self._mark_next
        if self.tokens > last and (wanted or self.tokens - last >= _MARK_EVERY_TOKENS):
            states = {index: _copy_of_states(self.layers[index]) for index in self._recurrent}
            self._marks = [*self._marks, _Mark(self.tokens, states)][-MARKS:]

    def after_step(self, hidden: Tensor, position_ids: Tensor | None) -> None:
        """A step has run over `hidden` [batch, tokens, hidden]; its tokens are held now."""
        batch, tokens, _ = hidden.shape
        if self._recurrent:
            if position_ids is None:
                position_ids = torch.arange(self.tokens, self.tokens + tokens, device=hidden.device)[None]
            position_ids = position_ids.to(hidden.device).expand(batch, tokens)
            first = self._inputs is None
            self._inputs = hidden.clone() if first else torch.cat([self._inputs, hidden], dim=1)  # type: ignore[list-item]
            self._positions = position_ids if first else torch.cat([self._positions, position_ids], dim=1)  # type: ignore[list-item]
        self.tokens += tokens
        self.batch = batch
        self._computed = self.tokens
        self._mark_next = tokens > 1
        if self._paged:
            self._paged.advance(tokens)
        else:
            self._room_pages = pages_for(self.tokens)
        if self.seat is not None:
            self.seat.tokens = self.tokens

    def rewind(self, tokens: int) -> None:
        """Stand at the first `tokens` tokens, whatever the blocks hold: a step may have ended half-way."""
        if tokens == 0:
            self.clear()
            return
        self.tokens = self._computed = tokens
        if self._paged:
            self._paged.crop(tokens)
            return
        if self.seat is not None:
            self.seat.tokens = tokens
            for layer in self.blocks:
                layer.forget(tokens)
            return
        if self._recurrent:
            self._restore(tokens)
        for layer in self.blocks:
            _truncate(layer, self._computed)

    def _restore(self, tokens: int) -> None:
        """Put the recurrent blocks back to the last mark at or before `tokens`."""
        self._marks = [mark for mark in self._marks if mark.tokens <= tokens]
        self._mark_next = True  # lest the same way be gone again
        if self._inputs is not None and self._positions is not None:
            self._inputs, self._positions = self._inputs[:, :tokens], self._positions[:, :tokens]
        if not self._marks:
            self._computed = 0
            self.layers = [*self._unused, *copy.deepcopy(self._kinds)]
            return
        self._computed = self._marks[-1].tokens
        for index, marked in self._marks[-1].layers.items():
            old, new = self.layers[index], _copy_of_states(marked)
            if isinstance(old, DynamicLayer):
                # A block with both attention and a state: the keys stay, and are cut like all others.
                new.keys, new.values, new.is_initialized = old.keys, old.values, old.is_initialized
            self.layers[index] = new

    def _select(self, rows: list[int]) -> None:
        self._stand_up()
        if self._paged or self._shares(rows):
            try:
                self._select_in_pages(rows)
            except BaseException:
                self.clear()  # some blocks have changed and some have not
                raise
            return
        self.batch = len(rows)
        self._room_pages = pages_for(self.tokens)
        index: Any = torch.tensor(rows)
        for layer in self.blocks:
            layer.reorder_cache(index)
        for mark in self._marks:
            for layer in mark.layers.values():
                LinearAttentionCacheLayerMixin.reorder_cache(layer, index)
        if self._inputs is not None and self._positions is not None:
            index = index.to(self._inputs.device)
            self._inputs = self._inputs.index_select(0, index)
            self._positions = self._positions.index_select(0, index)

    def _shares(self, rows: Sequence[int]) -> bool:
        """Whether rows in rooms of their own would share pages if these were chosen."""
        return len(set(rows)) < len(rows) and self.has_pages

    def _into_pages(self, rows: list[int]) -> PagedRows:
        blocks = self.blocks
        del self.layers[self.offset :]  # so that each room ends when its block has its pages
        paged = PagedRows.of(blocks, rows)
        self.layers += paged.layers
        return paged

    def _select_in_pages(self, rows: list[int]) -> None:
        if self._paged is None:
            distinct = {row: number for number, row in enumerate(sorted(set(rows)))}
            rows = [distinct[row] for row in rows]
            self._paged = self._into_pages(list(distinct))
        self._paged.order(rows)
        self.batch = len(rows)
        if len(rows) == 1:
            for index, rooms in enumerate(self._paged.into_rooms(), start=self.offset):
                self.layers[index] = _GrowingLayer.of(rooms, self.tokens)
            self._paged, self._room_pages = None, pages_for(self.tokens)

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


class _GrowingLayer(DynamicLayer):
    """Keys and values in tensors with room up to the next full page, so that a step writes only its own.

    transformers' layer copies all that it holds at every step, which for some sessions of a thousand tokens
    takes longer than the blocks themselves. Whatever has replaced `keys` meanwhile (another choice of rows)
    has no room behind it, and is copied once.

    Growing page by page copies n^2 / (2 x 32) tokens until there are n; attention reads n^2 / 2 on the way,
    so that larger rooms could save a sixteenth of its traffic (a copy reads and writes) at most. They would
    have to be leased while they are empty, and are not worth that.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms: tuple[Tensor, ...] = ()  # of which `keys` and `values` are the beginnings

    @classmethod
    def of(cls, rooms: tuple[Tensor, Tensor], tokens: int) -> _GrowingLayer:
        """A layer that holds the first so many tokens of some rooms."""
        layer = cls()
        layer.lazy_initialization(*rooms)
        layer._rooms = rooms
        layer.keys, layer.values = (room[..., :tokens, :] for room in rooms)
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.keys, self.values
        if keys is None or values is None or not keys.shape[-2]:
            self._rooms = ()
            return super().update(key_states, value_states, *args, **kwargs)
        held = keys.shape[-2]
        length = held + key_states.shape[-2]
        capacity = -(-length // PAGE_TOKENS) * PAGE_TOKENS
        if not self._has_room(keys, capacity):
            self._rooms = tuple(_room(part, capacity) for part in (keys, values))
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., held:length, :] = new
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)
        return self.keys, self.values

    def _has_room(self, keys: Tensor, capacity: int) -> bool:
        """Whether the present keys are the beginning of just such a room."""
        if not self._rooms:
            return False
        room = self._rooms[0]
        same_rows = room.shape[0] == keys.shape[0]
        return same_rows and room.shape[-2] == capacity and room.data_ptr() == keys.data_ptr()


def _layers_for(config: PreTrainedConfig) -> list[Any]:
    """Empty cache layers as transformers chooses them, except that none forgets tokens."""
    layers: list[Any] = []
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
            layers.append(LinearAttentionAndFullAttentionLayer(layer.number_of_states))
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(_GrowingLayer())  # type: ignore[no-untyped-call]
        else:
            layers.append(layer)
    return layers


def _room(part: Tensor, tokens: int) -> Tensor:
    """A room for so many tokens, which begins with what is held [rows, heads, held tokens, dim]."""
    room = part.new_empty(*part.shape[:-2], tokens, part.shape[-1])
    room[..., : part.shape[-2], :] = part
    return room


def _truncate(layer: Any, tokens: int) -> None:
    if not isinstance(layer, DynamicLayer) or layer.keys is None:
        return
    extra = layer.keys.shape[-2] - tokens
    if extra > 0:
        # A view; the next step copies what is kept and frees the rest. A recurrent state is not for this.
        recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
        (DynamicLayer if recurrent else type(layer)).crop(layer, -extra)


def _copy_of_states(layer: Any) -> Any:
    """A copy of a recurrent layer, without the keys and values that it may have besides."""
    same = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(same, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()})
    if isinstance(same, DynamicLayer):
        same.keys = same.values = None
    return same


def _nbytes(layer: Any) -> int:
    """Bytes of every tensor in a cache layer, whatever its kind; of a seat what is held there."""
    if isinstance(layer, StaticSlotLayer):
        return int(layer.keys.nbytes + layer.values.nbytes)
    inner = [value.values() if isinstance(value, dict) else [value] for value in vars(layer).values()]
    return sum(part.nbytes for parts in inner for part in parts if isinstance(part, Tensor))
