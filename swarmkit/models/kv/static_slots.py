"""Places where the keys and values of some sessions lie side by side, in tensors that never move.

Work that was recorded for an accelerator (`recordings`) reads and writes the addresses that it was recorded
with. So sessions that decode sit down in rows of tensors that stay where they are::

    row 0    [ keys of session a ......            ]
    row 1    [ keys of session b ...               ]     the same in every block
    row 2    [ nobody's                            ]
    spare    [ where rows without a token write    ]

A session that grows longer than a row stands up, and has a room of its own as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swarmkit.models.kv.held_layer import HeldLayer, KeysAndValues


@dataclass(eq=False)
class StaticSlot:
    """One session's row. It is free again when nobody holds this; the session's cache and layers do."""

    row: int
    length: int
    """Tokens that there is place for."""
    tokens: int
    """Tokens that it holds."""


class StaticSlotLayer(HeldLayer):
    """Keys and values of one block in a seat [1, heads, length, dim]."""

    def __init__(self, rooms: KeysAndValues, seat: StaticSlot) -> None:
        super().__init__(rooms[0])
        self.rooms = rooms
        self._seat = seat

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """[1, heads, tokens, dim]"""
        return self.rooms[0][..., : self._seat.tokens, :]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """[1, heads, tokens, dim]"""
        return self.rooms[1][..., : self._seat.tokens, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KeysAndValues:
        """Write [1, heads, new tokens, dim] behind what the seat holds; returns all, with the new ones."""
        start = self._seat.tokens
        stop = start + key_states.shape[-2]
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., start:stop, :] = new
        keys, values = (room[..., :stop, :] for room in self.rooms)
        return keys, values

    @torch.inference_mode()
    def forget(self, tokens: int) -> None:
        """Keep so many tokens. What recorded work multiplies by 0 must not be infinity, or worse."""
        for room in self.rooms:
            room[..., tokens:, :] = 0

    def get_seq_length(self) -> int:
        return self._seat.tokens

    def get_max_length(self) -> int:
        return self._seat.length


class StaticSlots:
    """A stage's rows.

    Attributes:
        rows: how many sessions may sit; the row of this number is the spare one.
        length: tokens of a row.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows = rows
        self.length = length
        self._pools: dict[int, KeysAndValues] = {}
        self._taken: list[weakref.ref[StaticSlot] | None] = [None] * rows

    def pool(self, block: int) -> KeysAndValues:
        """Keys and values [rows + 1, heads, length, dim] of all rows in a block where somebody has sat."""
        return self._pools[block]

    @torch.inference_mode()
    def take(
        self, first: int, blocks: Sequence[Any], tokens: int
    ) -> tuple[StaticSlot, list[StaticSlotLayer]] | None:
        """A seat with what a session holds, and its cache layers from now on; None if none is free.

        Args:
            first: number of the first of its blocks within the stage.
            blocks: cache layers with keys and values [1, heads, tokens, dim].
            tokens: less than `length`.
        """
        row = next((row for row, ref in enumerate(self._taken) if ref is None or ref() is None), None)
        if row is None:
            return None
        seat, layers = StaticSlot(row, self.length, tokens), []
        for block, layer in enumerate(blocks, start=first):
            held = layer.keys, layer.values
            pool = self._pools.get(block)
            if pool is None:
                pool = self._pools[block] = _pool(self, held[0]), _pool(self, held[1])
            keys, values = (part[row : row + 1] for part in pool)
            for room, part in zip((keys, values), held, strict=True):
                room[..., :tokens, :] = part
            layers.append(StaticSlotLayer((keys, values), seat))
            layers[-1].forget(tokens)  # what others have left
        self._taken[row] = weakref.ref(seat)
        return seat, layers


def _pool(seats: StaticSlots, part: Tensor) -> Tensor:
    _, heads, _, dim = part.shape
    return part.new_zeros(seats.rows + 1, heads, seats.length, dim)
