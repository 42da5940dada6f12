"""Keys and values of several rows that share pages, in all blocks of a session.

Rows of a batch come to share what they hold when one is chosen twice: beams, or several answers to a prompt.
From then on their keys and values lie in pages, and a table (`page_table`) tells which row is made of which::

    one row, or rows that stay as they are       rows of which one was chosen twice

    row 0  [ keys of all tokens .... | room ]    slots  [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ]...   in every block
    row 1  [ keys of all tokens .... | room ]    row 0    0    1    2         4
                                                 row 1    0    1         3             the same for all blocks

Why both. Attention on a CPU wants each row's keys behind one another, so pages have to be gathered in every
block at every step. For one row, and for rows that never change places, that would be a copy of everything
where now there is none: these stay in rooms of their own, to which a step only appends. Beams change places
at nearly every step. With n rows of L tokens and b bytes per token of a block, such a step writes, per block,

    in rooms    n L b for the rows chosen, and n L b again into rooms with place for another token
    in pages    n L b gathered for the attention, and at most n PAGE_TOKENS b: copies of partly filled pages

and holds n L b in rooms, but in pages only what differs: L b and the beams' own ends. What is gathered lives
no longer than one block runs. A row that is alone again is given a room again.

What is gathered has the shape and strides that a room has, so that results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swarmkit.models.kv.held_layer import HeldLayer, KeysAndValues
from swarmkit.models.kv.page_table import PAGE_TOKENS, PageTable, pages_for


@dataclass(eq=False)
class _Plan:
    """Where the tokens of a step go, and which pages the rows have with them; the same for all blocks."""

    new_tokens: int
    tokens: int
    """With the new ones."""
    table: Tensor
    """[rows, pages] of slots."""
    slots: Tensor
    """[rows x new tokens]"""
    places: Tensor
    """[rows x new tokens], within the page"""
    _indices: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, table: PageTable, new_tokens: int, device: torch.device) -> _Plan:
        """Args: table: new tokens are reserved in it, but not held yet."""
        rows = torch.tensor(table.rows, device=device)
        positions = torch.arange(table.tokens, table.tokens + new_tokens, device=device)
        slots = rows[:, positions // PAGE_TOKENS].flatten()
        places = (positions % PAGE_TOKENS).repeat(len(table.rows))
        return cls(new_tokens, table.tokens + new_tokens, rows, slots, places)

    def index(self, heads: int) -> Tensor:
        """[rows x heads x pages]: where each row's pages are, of slots with so many heads one by one."""
        if heads not in self._indices:
            each = torch.arange(heads, device=self.table.device)[:, None]
            self._indices[heads] = (self.table[:, None, :] * heads + each).flatten()
        return self._indices[heads]


@dataclass(eq=False)
class _Shared:
    """What all blocks look at."""

    table: PageTable
    plan: _Plan | None = None
    """Of the step that is under way."""


class PagedLayer(HeldLayer):
    """Keys and values of one block in pages [slots, heads, PAGE_TOKENS, dim]."""

    def __init__(self, pools: tuple[Tensor, ...], shared: _Shared) -> None:
        super().__init__(pools[0])
        self.pools = pools
        self._shared = shared

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """A copy of what the rows hold [rows, heads, tokens, dim]."""
        return self._held()[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """A copy of what the rows hold [rows, heads, tokens, dim]."""
        return self._held()[1]

    def _held(self) -> KeysAndValues:
        table = self._shared.table
        keys, values = self.gather(_Plan.of(table, 0, self.device))
        return keys[..., : table.tokens, :], values[..., : table.tokens, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> KeysAndValues:
        """Append [rows, heads, new tokens, dim]; returns all that the rows hold, gathered."""
        plan = self._shared.plan
        if plan is None or plan.new_tokens != key_states.shape[-2]:
            raise RuntimeError(f"there is no room in the pages for {key_states.shape[-2]} tokens")
        for pool, new in zip(self.pools, (key_states, value_states), strict=True):
            pool.transpose(1, 2)[plan.slots, plan.places] = new.transpose(1, 2).flatten(0, 1)
        keys, values = self.gather(plan)
        return keys[..., : plan.tokens, :], values[..., : plan.tokens, :]

    def gather(self, plan: _Plan) -> KeysAndValues:
        """Keys and values [rows, heads, tokens of whole pages, dim] of a plan's rows, contiguous."""
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
        """Have no more than so many slots."""
        self.pools = tuple(pool[:slots].clone() for pool in self.pools)

    def get_seq_length(self) -> int:
        return self._shared.table.tokens

    def get_max_length(self) -> int:
        return -1


class PagedRows:
    """All rows of a session in pages.

    Whatever fails in here for want of memory, the table never names a page that some block does not have:
    pages are copied and moved in all blocks before it is changed.

    Attributes:
        layers: one for each block.
    """

    def __init__(self, layers: list[PagedLayer], shared: _Shared) -> None:
        self.layers = layers
        self._shared = shared

    @classmethod
    @torch.inference_mode()
    def of(cls, layers: list[Any], rows: Sequence[int]) -> PagedRows:
        """Some rows of a batch, none of them named twice.

        Args: layers: with keys and values [batch, heads, tokens, dim]; each is replaced in the list.
        """
        shared = _Shared(_shared_table([(layer.keys, layer.values) for layer in layers], rows))
        for index, layer in enumerate(layers):
            pools = tuple(_pool(part, rows, shared.table) for part in (layer.keys, layer.values))
            layers[index] = PagedLayer(pools, shared)
        return cls(layers, shared)

    @property
    def table(self) -> PageTable:
        """Of all blocks."""
        return self._shared.table

    @property
    def nbytes(self) -> int:
        """All that the pages take, with those that are free."""
        return sum(pool.nbytes for layer in self.layers for pool in layer.pools)

    @torch.inference_mode()
    def order(self, rows: Sequence[int]) -> None:
        """Row i is from now on what row `rows[i]` was."""
        self._shared.plan = None
        self.table.order(rows)
        self._compact()

    @torch.inference_mode()
    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        self._shared.plan = None
        self.table.crop(tokens)
        self._compact()

    @torch.inference_mode()
    def reserve(self, tokens: int) -> None:
        """Before a step of so many tokens."""
        table = self.table.copy()
        copies = self._copies(table.reserve(tokens))
        plan = _Plan.of(table, tokens, self.layers[0].device)
        for layer in self.layers:
            layer.fit(table.slots, copies)
        self._shared.table, self._shared.plan = table, plan

    def advance(self, tokens: int) -> None:
        """After it."""
        self.table.advance(tokens)
        self._shared.plan = None

    @torch.inference_mode()
    def into_rooms(self) -> Iterator[KeysAndValues]:
        """Block by block keys and values [rows, heads, tokens of whole pages, dim]; frees the pages."""
        plan = _Plan.of(self.table, 0, self.layers[0].device)
        for layer in self.layers:
            rooms = layer.gather(plan)
            layer.pools = ()
            yield rooms

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
    """The table of some rows of a batch.

    Rows that began alike (beams of one prompt are computed side by side at first) hold the same keys and
    values up to where they part: full pages that equal those of the row before, to the last bit and in all
    blocks, are stored once.

    Args:
        blocks: keys and values [batch, heads, tokens, dim] of each block.
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
    """With how many equal full pages two rows begin."""
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
    """Keys or values [batch, heads, tokens, dim] of the rows that a new table is of, in their slots."""
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
