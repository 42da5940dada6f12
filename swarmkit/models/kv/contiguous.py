"""The layout that every session begins with: each row's keys and values behind one another.

The memory of a row has room up to the next full page, so that a step writes only its own tokens. Recurrent
blocks, whose states are not made of tokens, are in this layout always.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from swarmkit.models.kv.layout import KeysAndValues, with_room
from swarmkit.models.kv.page_table import PAGE_TOKENS, pages_for


class ContiguousRows:
    """Rows with memory of their own; see `KVLayout`."""

    def __init__(self, layers: list[Any], rows: int = 0, tokens: int = 0) -> None:
        self.layers = layers
        self._rows = rows
        self._pages = pages_for(tokens)
        """Pages that each row has room for."""

    @classmethod
    def of(cls, rooms: Iterable[KeysAndValues], rows: int, tokens: int) -> ContiguousRows:
        """Rows of `tokens` tokens, the first in each block's [rows, heads, tokens of whole pages, dim]."""
        return cls([GrowingLayer.of(room, tokens) for room in rooms], rows, tokens)

    @property
    def has_pages(self) -> bool:
        return all(isinstance(layer, GrowingLayer) for layer in self.layers)

    @property
    def pages(self) -> int:
        return self._rows * self._pages

    @property
    def nbytes(self) -> int:
        return sum(nbytes_of(layer) for layer in self.layers)

    def reserve(self, tokens: int) -> bool:
        if tokens > self._pages * PAGE_TOKENS:
            self._pages = pages_for(tokens)
        return True

    def hold(self, rows: int, tokens: int) -> None:
        self._rows = rows
        if not 0 <= self._pages * PAGE_TOKENS - tokens < PAGE_TOKENS:
            self._pages = pages_for(tokens)

    def crop(self, tokens: int) -> None:
        for layer in self.layers:
            if not isinstance(layer, DynamicLayer) or layer.keys is None:
                continue
            extra = layer.keys.shape[-2] - tokens
            if extra > 0:
                # A view; the next step copies what is kept and frees the rest. The state of a layer that has
                # one as well is not cropped here.
                recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
                (DynamicLayer if recurrent else type(layer)).crop(layer, -extra)

    def select(self, rows: Sequence[int]) -> None:
        index: Any = torch.tensor(rows)
        for layer in self.layers:
            layer.reorder_cache(index)
        self._rows = len(rows)

    def into_rooms(self) -> Iterator[KeysAndValues]:
        raise NotImplementedError("contiguous rows have rooms already")

    # A step over some rows at a time.

    @torch.inference_mode()
    def make_rooms(self, tokens: int) -> None:
        """Have the memory that the new tokens of all rows are written to, up to `tokens` tokens per row."""
        for layer in self.layers:
            layer.make_room(tokens)

    def layers_of(self, first: int, last: int) -> list[Any]:
        """Layers that read and write rows [first, last) only."""
        return [layer.of_rows(first, last) for layer in self.layers]

    def fill_rooms(self, tokens: int) -> None:
        """The new tokens of all rows have been written, so that each holds `tokens` tokens."""
        for layer in self.layers:
            layer.hold(tokens)

    def shared_pages(self, order: Sequence[int] | None, tokens: int) -> int | None:
        if order is None or len(set(order)) == len(order) or not self.has_pages:
            return None
        return len(set(order)) * pages_for(tokens)


class GrowingLayer(DynamicLayer):
    """Keys and values of one block in tensors with room up to the next full page.

    transformers' own layer copies all that it holds at every step, which for some sessions of a thousand
    tokens takes longer than the blocks themselves. If `keys` was replaced meanwhile (by another choice of
    rows), it has no room behind it, and is copied once.

    Growing page by page copies n^2 / (2 x 32) tokens until there are n; attention reads n^2 / 2 on the way,
    so that larger rooms could save a sixteenth of its traffic (a copy reads and writes) at most. They would
    have to be leased while they are empty, and are not worth that.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms: tuple[Tensor, ...] = ()  # of which `keys` and `values` are the beginnings

    @classmethod
    def of(cls, rooms: KeysAndValues, tokens: int) -> GrowingLayer:
        """A layer that holds the first `tokens` tokens of its rooms."""
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
        self.make_room(length)
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., held:length, :] = new
        self.hold(length)
        return self.keys, self.values

    def make_room(self, tokens: int) -> None:
        """Have room for `tokens` tokens in all, of which some are held."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        capacity = -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
        if not self._has_room(keys, capacity):
            self._rooms = tuple(with_room(part, capacity) for part in (keys, values))

    def hold(self, tokens: int) -> None:
        """Hold the first `tokens` tokens of the rooms."""
        self.keys, self.values = (room[..., :tokens, :] for room in self._rooms)

    def of_rows(self, first: int, last: int) -> GrowingLayer:
        """A layer of rows [first, last), in the same rooms."""
        keys, values = self._rooms
        return GrowingLayer.of((keys[first:last], values[first:last]), self.get_seq_length())

    def _has_room(self, keys: Tensor, capacity: int) -> bool:
        """Whether the present keys are the beginning of a room of just this capacity."""
        if not self._rooms:
            return False
        room = self._rooms[0]
        same_rows = room.shape[0] == keys.shape[0]
        return same_rows and room.shape[-2] == capacity and room.data_ptr() == keys.data_ptr()


def empty_layers(config: PreTrainedConfig) -> list[Any]:
    """Empty cache layers as transformers chooses them for these blocks, except that none forgets tokens."""
    layers: list[Any] = []
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
            layers.append(LinearAttentionAndFullAttentionLayer(layer.number_of_states))
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(GrowingLayer())
        else:
            layers.append(layer)
    return layers


def nbytes_of(layer: Any) -> int:
    """Bytes of every tensor in a cache layer, whatever its kind; of a room only what is held in it."""
    inner = [value.values() if isinstance(value, dict) else [value] for value in vars(layer).values()]
    return sum(part.nbytes for parts in inner for part in parts if isinstance(part, Tensor))
