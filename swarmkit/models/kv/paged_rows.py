"""The layout of rows that share pages: keys and values of all blocks of a session.

Rows of a batch begin to share what they hold when one is chosen twice: beams, or several answers to a prompt.
From then on their keys and values lie in pages, and a table (`page_table`) tells which row is made of which::

    one row, or rows that stay as they are       rows of which one was chosen twice

    row 0  [ keys of all tokens .... | room ]    slots  [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ]...   in every block
    row 1  [ keys of all tokens .... | room ]    row 0    0    1    2         4
                                                 row 1    0    1         3             the same for all blocks

There are two layouts because attention on a CPU reads each row's keys behind one another, so that pages have
to be gathered in every block at every step. For one row, and for rows that never change places, that would
copy everything where now nothing is copied: these stay contiguous, and a step only appends to them. Beams
change places at nearly every step. With n rows of L tokens and b bytes per token of a block, such a step
writes, per block,

    contiguous  n L b for the rows chosen, and n L b again into memory with room for another token
    in pages    n L b gathered for the attention, and at most n PAGE_TOKENS b: copies of partly filled pages

and holds n L b contiguous, but in pages only what differs: L b and the beams' own ends. What is gathered
lives no longer than one block runs.

What is gathered has the shape and strides of contiguous rows, so that results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swarmkit.models.kv.layout import HeldLayer, KeysAndValues
from swarmkit.models.kv.page_table import PAGE_TOKENS, PageTable, pages_for


@dataclass(eq=False)
class _Plan:
    """Where the tokens of a step are written, and the pages of each row with them, in all blocks."""

    new_tokens: int
    tokens: int
    """Held tokens and new ones, per row."""
    table: Tensor
    """Slot of each page of each row, `[rows, pages]`."""
    slots: Tensor
    """Slot that each new token is written to, `[rows x new tokens]`."""
    places: Tensor
    """Index within its slot of each new token, `[rows x new tokens]`."""
    _indices: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, table: PageTable, new_tokens: int, device: torch.device) -> _Plan:
        """Args: table: has reserved the new tokens, but does not hold them yet."""
        rows = torch.tensor(table.rows, device=device)
        positions = torch.arange(table.tokens, table.tokens + new_tokens, device=device)
        slots = rows[:, positions // PAGE_TOKENS].flatten()
        places = (positions % PAGE_TOKENS).repeat(len(table.rows))
        return cls(new_tokens, table.tokens + new_tokens, rows, slots, places)

    def of_rows(self, first: int, last: int) -> _Plan:
        """The plan of rows [first, last)."""
        new = slice(first * self.new_tokens, last * self.new_tokens)
        return _Plan(self.new_tokens, self.tokens, self.table[first:last], self.slots[new], self.places[new])

    def index(self, heads: int) -> Tensor:
        """Indices of each row's pages in a pool whose heads lie one by one, `[rows x heads x pages]`."""
        if heads not in self._indices:
            each = torch.arange(heads, device=self.table.device)[:, None]
            self._indices[heads] = (self.table[:, None, :] * heads + each).flatten()
        return self._indices[heads]


@dataclass(eq=False)
class _Shared:
    """What the layers of all blocks share."""

    table: PageTable
    plan: _Plan | None = None
    """The plan of the step that is under way."""


class PagedLayer(HeldLayer):
    """Keys and values of one block in pages [slots, heads, PAGE_TOKENS, dim]."""

    def __init__(self, pools: tuple[Tensor, ...], shared: _Shared) -> None:
        super().__init__(pools[0])
        self.pools = pools
        self._shared = shared

    @property
    def table(self) -> PageTable:
        """The page table, which all blocks share."""
        return self._shared.table

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """A copy of what the rows hold, `[rows, heads, tokens, dim]`."""
        return self._held()[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """A copy of what the rows hold, `[rows, heads, tokens, dim]`."""
        return self._held()[1]

    def _held(self) -> KeysAndValues:
        table = self._shared.table
        keys, values = self.gather(_Plan.of(table, 0, self.device))
        return keys[..., : table.tokens, :], values[..., : table.tokens, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KeysAndValues:
        """Append `[rows, heads, new tokens, dim]`, and return all that the rows hold, gathered."""
        plan = self._shared.plan
        if plan is None or plan.new_tokens != key_states.shape[-2]:
            raise RuntimeError(f"there is no room in the pages for {key_states.shape[-2]} tokens")
        for pool, new in zip(self.pools, (key_states, value_states), strict=True):
            pool.transpose(1, 2)[plan.slots, plan.places] = new.transpose(1, 2).flatten(0, 1)
        keys, values = self.gather(plan)
        return keys[..., : plan.tokens, :], values[..., : plan.tokens, :]

    def gather(self, plan: _Plan) -> KeysAndValues:
        """Keys and values of a plan's rows, `[rows, heads, tokens of whole pages, dim]`, contiguous."""
        keys, values = (_gathered(pool, plan) for pool in self.pools)
        return keys, values

    def fit(self, slots: int, copies: Tensor | None) -> None:
        """Have at least so many slots, and copy pages from some to others: [sources and targets, copies]."""
        missing = slots - len(self.pools[0])
        if missing > 0:
            self.pools = tuple(
                torch.cat([pool, pool.new_empty(missing, *pool.shape[1:])]) for pool in self.pools
            )
        if copies is not None:
            for pool in self.pools:
                pool[copies[1]] = pool[copies[0]]

    def shrink(self, slots: int) -> None:
        """Have no more than `slots` slots."""
        self.pools = tuple(pool[:slots].clone() for pool in self.pools)

    def get_seq_length(self) -> int:
        return self._shared.table.tokens

    def get_max_length(self) -> int:
        return -1


class PagedRows:
    """Rows that share pages; see `KVLayout`.

    If anything in here fails for want of memory, the table names no page that some block does not have: pages
    are copied and moved in all blocks before it is changed.
    """

    has_pages = False

    def __init__(self, layers: list[Any], shared: _Shared) -> None:
        """Args: layers: a `PagedLayer` for each block."""
        self.layers = layers
        self._shared = shared

    @classmethod
    @torch.inference_mode()
    def of(cls, layers: list[Any], rows: Sequence[int]) -> PagedRows:
        """Some rows of a batch, none of them named twice.

        Args:
            layers: with keys and values `[batch, heads, tokens, dim]`. Each is replaced in the list, so that
                its memory is freed before the next block's pages are made.
        """
        shared = _Shared(_shared_table([(layer.keys, layer.values) for layer in layers], rows))
        for index, layer in enumerate(layers):
            pools = tuple(_pool(part, rows, shared.table) for part in (layer.keys, layer.values))
            layers[index] = PagedLayer(pools, shared)
        return cls(layers, shared)

    @property
    def table(self) -> PageTable:
        """The page table of all blocks."""
        return self._shared.table

    @property
    def pages(self) -> int:
        return self.table.slots

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for layer in self.layers for pool in layer.pools)

    @torch.inference_mode()
    def reserve(self, tokens: int) -> bool:
        table = self.table.copy()
        new_tokens = tokens - table.tokens
        copies = self._copies(table.reserve(new_tokens))
        plan = _Plan.of(table, new_tokens, self.layers[0].device)
        for layer in self.layers:
            layer.fit(table.slots, copies)
        self._shared.table, self._shared.plan = table, plan
        return True

    def hold(self, rows: int, tokens: int) -> None:
        self.table.advance(tokens - self.table.tokens)
        self._shared.plan = None

    @torch.inference_mode()
    def crop(self, tokens: int) -> None:
        self._shared.plan = None
        self.table.crop(tokens)
        self._compact()

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        self._shared.plan = None
        self.table.order(rows)
        self._compact()

    @torch.inference_mode()
    def into_rooms(self) -> Iterator[KeysAndValues]:
        plan = _Plan.of(self.table, 0, self.layers[0].device)
        for layer in self.layers:
            rooms = layer.gather(plan)
            layer.pools = ()
            yield rooms

    def layers_of(self, first: int, last: int) -> list[Any]:
        """After `reserve`: layers that read and write rows [first, last) only."""
        plan = self._shared.plan
        assert plan is not None
        shared = _Shared(self._shared.table, plan.of_rows(first, last))
        return [PagedLayer(layer.pools, shared) for layer in self.layers]

    def shared_pages(self, order: Sequence[int] | None, tokens: int) -> int | None:
        return self.table.slots

    def _compact(self) -> None:
        if not self.table.wasteful:
            return
        table = self.table.copy()
        moves = self._copies(table.compact())
        for layer in self.layers:
            layer.fit(0, moves)
        self._shared.table = table
        for layer in self.layers:
            layer.shrink(table.slots)

    def _copies(self, pairs: list[tuple[int, int]]) -> Tensor | None:
        return torch.tensor(pairs, device=self.layers[0].device).T if pairs else None


def _shared_table(blocks: Sequence[KeysAndValues], rows: Sequence[int]) -> PageTable:
    """Make the table of some rows of a batch.

    Rows that began alike (beams of one prompt are computed side by side at first) hold the same keys and
    values up to where they part: full pages that equal those of the row before, to the last bit and in all
    blocks, are stored once.

    Args:
        blocks: keys and values of each block, `[batch, heads, tokens, dim]`.
        rows: none of them twice.
    """
    tokens = blocks[0][0].shape[-2]
    table: list[list[int]] = []
    slots = 0
    for number, row in enumerate(rows):
        known = table[-1][: _pages_alike(blocks, rows[number - 1], row)] if table else []
        new = pages_for(tokens) - len(known)
        table.append([*known, *range(slots, slots + new)])
        slots += new
    return PageTable(table, tokens)


def _pages_alike(blocks: Sequence[KeysAndValues], row: int, next_row: int) -> int:
    """Number of equal full pages that two rows begin with."""
    pages: int = blocks[0][0].shape[-2] // PAGE_TOKENS
    for block in blocks:
        for part in block:
            if not pages:
                return 0
            one, two = (part[index, :, : pages * PAGE_TOKENS] for index in (row, next_row))
            equal = (one == two).unflatten(1, (pages, PAGE_TOKENS)).flatten(2).all(dim=2).all(dim=0)
            pages = int(equal.long().cumprod(0).sum())
    return pages


def _pool(part: Tensor, rows: Sequence[int], table: PageTable) -> Tensor:
    """Put keys or values `[batch, heads, tokens, dim]` of the rows of a new table into their slots."""
    _, heads, tokens, dim = part.shape
    full, rest = divmod(tokens, PAGE_TOKENS)
    pool = part.new_empty(table.slots, heads, PAGE_TOKENS, dim)
    filled = 0
    for row, slots in zip(rows, table.rows, strict=True):
        # What a row does not share with those before it is in slots behind theirs.
        first = next((index for index, slot in enumerate(slots) if slot >= filled), len(slots))
        if first < full:
            own = part[row, :, first * PAGE_TOKENS : full * PAGE_TOKENS].unflatten(1, (-1, PAGE_TOKENS))
            pool[filled : filled + full - first] = own.transpose(0, 1)
        if rest:
            pool[slots[-1], :, :rest] = part[row, :, full * PAGE_TOKENS :]
        filled += len(slots) - first
    return pool


def _gathered(pool: Tensor, plan: _Plan) -> Tensor:
    _, heads, _, dim = pool.shape
    rows, pages = plan.table.shape
    flat = pool.view(-1, PAGE_TOKENS * dim).index_select(0, plan.index(heads))
    return flat.view(rows, heads, pages * PAGE_TOKENS, dim)
