"""The layout of sessions that decode through CUDA graphs: rows side by side, in tensors that never move.

A CUDA graph reads and writes the addresses that it was recorded with. So a session takes a *slot*, a row of
tensors that stay where they are::

    slot 0   [ keys of session a ......            ]
    slot 1   [ keys of session b ...               ]     the same in every block
    slot 2   [ free                                ]
    spare    [ where rows without a token write    ]
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swarmkit.models.kv.layout import HeldLayer, KeysAndValues, with_room
from swarmkit.models.kv.page_table import PAGE_TOKENS, pages_for


@dataclass(eq=False)
class StaticSlot:
    """A slot that is taken; it is free again when nothing refers to this object (a session's cache does)."""

    row: int
    length: int
    """Tokens that it has room for."""
    tokens: int
    """Tokens that it holds."""


class StaticSlotLayer(HeldLayer):
    """Keys and values of one block in a slot, `[1, heads, length, dim]`."""

    def __init__(self, rooms: KeysAndValues, slot: StaticSlot, clears: bool) -> None:
        """Args: clears: see `StaticSlots`."""
        super().__init__(rooms[0])
        self.rooms = rooms
        self._slot = slot
        self._clears = clears

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """Keys that the slot holds, `[1, heads, tokens, dim]`."""
        return self.rooms[0][..., : self._slot.tokens, :]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values that the slot holds, `[1, heads, tokens, dim]`."""
        return self.rooms[1][..., : self._slot.tokens, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KeysAndValues:
        """Write `[1, heads, new tokens, dim]` behind what the slot holds, and return all, with the new
        tokens.
        """
        start = self._slot.tokens
        stop = start + key_states.shape[-2]
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., start:stop, :] = new
        keys, values = (room[..., :stop, :] for room in self.rooms)
        return keys, values

    @torch.inference_mode()
    def crop_to(self, tokens: int) -> None:
        """Keep `tokens` tokens."""
        if self._clears:
            for room in self.rooms:
                room[..., tokens:, :] = 0

    def get_seq_length(self) -> int:
        return self._slot.tokens

    def get_max_length(self) -> int:
        return self._slot.length


class SlotRow:
    """One session's row in a static slot; see `KVLayout`."""

    has_pages = True

    def __init__(self, layers: list[StaticSlotLayer], slot: StaticSlot) -> None:
        self.layers: list[Any] = list(layers)
        self.slot = slot
        self._pages = pages_for(slot.tokens)

    @property
    def pages(self) -> int:
        return self._pages

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> bool:
        self._pages = max(self._pages, pages_for(tokens))
        return tokens <= self.slot.length

    def hold(self, rows: int, tokens: int) -> None:
        self.slot.tokens, self._pages = tokens, pages_for(tokens)

    def crop(self, tokens: int) -> None:
        self.slot.tokens = tokens
        for layer in self.layers:
            layer.crop_to(tokens)

    def select(self, rows: Sequence[int]) -> None:
        raise NotImplementedError("a static slot holds one row")

    def into_rooms(self) -> Iterator[KeysAndValues]:
        tokens = pages_for(self.slot.tokens) * PAGE_TOKENS
        for layer in self.layers:
            yield with_room(layer.keys, tokens), with_room(layer.values, tokens)

    def shared_pages(self, order: Sequence[int] | None, tokens: int) -> int | None:
        if order is None or len(set(order)) == len(order):
            return None
        return len(set(order)) * pages_for(tokens)


class StaticSlots:
    """The slots of a stage.

    Attributes:
        rows: number of slots; the row of this number is the spare one.
        length: tokens that each slot has room for.
    """

    def __init__(self, rows: int, length: int, clears: bool = True) -> None:
        """Args:
        clears: set what is empty to 0: a graph multiplies it by 0, which infinity would outlast. Without,
            memory that no token was written to is never touched, and a system gives none for it.
        """
        self.rows = rows
        self.length = length
        self._clears = clears
        self._pools: dict[int, KeysAndValues] = {}
        self._taken: list[weakref.ref[StaticSlot] | None] = [None] * rows

    def pool(self, block: int) -> KeysAndValues:
        """Keys and values of a block's slots, `[rows + 1, heads, length, dim]`, once a session was in one."""
        return self._pools[block]

    @torch.inference_mode()
    def take(self, first: int, blocks: Sequence[Any], tokens: int) -> SlotRow | None:
        """Move what a session holds to a free slot; None if there is none.

        Args:
            first: number of the first of its blocks within the stage.
            blocks: cache layers with keys and values `[1, heads, tokens, dim]`.
            tokens: less than `length`.
        """
        row = next((row for row, ref in enumerate(self._taken) if ref is None or ref() is None), None)
        if row is None:
            return None
        slot, layers = StaticSlot(row, self.length, tokens), []
        for block, layer in enumerate(blocks, start=first):
            held = layer.keys, layer.values
            pool = self._pools.get(block)
            if pool is None:
                pool = self._pools[block] = self._new_pool(held[0]), self._new_pool(held[1])
            keys, values = (part[row : row + 1] for part in pool)
            for room, part in zip((keys, values), held, strict=True):
                room[..., :tokens, :] = part
            layers.append(StaticSlotLayer((keys, values), slot, self._clears))
            layers[-1].crop_to(tokens)  # what other sessions have left
        self._taken[row] = weakref.ref(slot)
        return SlotRow(layers, slot)

    def release(self) -> None:
        """Give out no slots any more, and hold no memory. Sessions leave their slots with their next step."""
        for ref in self._taken:
            slot = None if ref is None else ref()
            if slot is not None:
                slot.length = 0
        self.rows = self.length = 0
        self._taken, self._pools = [], {}

    def _new_pool(self, part: Tensor) -> Tensor:
        _, heads, _, dim = part.shape
        return part.new_zeros(self.rows + 1, heads, self.length, dim)
