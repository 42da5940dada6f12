"""The pages of each row of a batch whose rows share some: plain numbers, no tensors.

::

    row 0   [ 0 | 1 | 2 | 5 ]     owners of slot   0  1  2  3  4  5  6  7
    row 1   [ 0 | 1 | 2 | 6 ]                      3  3  2  1  -  1  1  1
    row 2   [ 0 | 1 | 3 | 7 ]                                  free
                          └ the last page of a row may be partly filled

What always holds (`audit`):

- every row has a page for each `PAGE_TOKENS` of `tokens`, or part of them;
- a slot has as many owners as rows name it, and is free with none: used + free = slots;
- a page that is about to be written to (`reserve`) has one owner: a row that shares it gets a copy first.

Choosing rows (beams that go on, are repeated or dropped) only changes the owners.
"""

from __future__ import annotations

from collections.abc import Sequence

PAGE_TOKENS = 32
"""Tokens of one row by which memory for keys and values grows."""


def pages_for(tokens: int) -> int:
    """Number of pages that `tokens` tokens of one row take."""
    return -(-tokens // PAGE_TOKENS)


class PageTable:
    """The pages of some rows that all hold the same number of tokens.

    Attributes:
        rows: for each row the slots of its pages, in order.
        tokens: number of tokens that each row holds.
    """

    def __init__(self, rows: Sequence[Sequence[int]], tokens: int) -> None:
        """Args: rows: slots from 0 on, none of them left out."""
        self.rows = [list(row) for row in rows]
        self.tokens = tokens
        self._owners = [0] * (1 + max((slot for row in self.rows for slot in row), default=-1))
        self._free: list[int] = []
        for row in self.rows:
            self._own(row)

    @property
    def slots(self) -> int:
        """Number of pages that there must be memory for."""
        return len(self._owners)

    @property
    def spare(self) -> int:
        """Number of slots that are free."""
        return len(self._free)

    @property
    def wasteful(self) -> bool:
        """Whether more slots are free than there are rows; so many will soon be used again."""
        return self.spare > len(self.rows)

    def copy(self) -> PageTable:
        """A copy of the table, to try something on."""
        same = PageTable([], self.tokens)
        same.rows = [row.copy() for row in self.rows]
        same._owners, same._free = self._owners.copy(), self._free.copy()
        return same

    def order(self, rows: Sequence[int]) -> None:
        """Let row i be what row `rows[i]` was."""
        old, self.rows = self.rows, [self.rows[row].copy() for row in rows]
        for row in self.rows:
            self._own(row)
        for row in old:
            self._disown(row)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens, of `self.tokens` and of what was reserved behind them."""
        pages = pages_for(tokens)
        for row in self.rows:
            self._disown(row[pages:])
            del row[pages:]
        self.tokens = tokens

    def reserve(self, tokens: int) -> list[tuple[int, int]]:
        """Have room for `tokens` more tokens in each row, in pages that no other row shares.

        Returns: (slot, new slot) of the partly filled pages that must be copied first.
        """
        written = self.tokens // PAGE_TOKENS
        pages = pages_for(self.tokens + tokens)
        copies = []
        for row in self.rows:
            if written < len(row) and self._owners[row[written]] > 1:
                slot = self._take()
                copies.append((row[written], slot))
                self._disown(row[written : written + 1])
                row[written] = slot
            while len(row) < pages:
                row.append(self._take())
        return copies

    def advance(self, tokens: int) -> None:
        """Hold `tokens` of the tokens that were reserved."""
        self.tokens += tokens

    def compact(self) -> list[tuple[int, int]]:
        """Leave no slot free.

        Returns: (slot, new slot) of the pages that must be moved, before there may be fewer slots.
        """
        used = self.slots - self.spare
        holes = iter(sorted(slot for slot in self._free if slot < used))
        moved = {slot: next(holes) for slot in range(used, self.slots) if self._owners[slot]}
        for old, new in moved.items():
            self._owners[new] = self._owners[old]
        self.rows = [[moved.get(slot, slot) for slot in row] for row in self.rows]
        del self._owners[used:]
        self._free = []
        return list(moved.items())

    def audit(self) -> None:
        """Raise AssertionError unless the tables, the owners and the free slots agree."""
        owners = [0] * self.slots
        for row in self.rows:
            if len(row) != pages_for(self.tokens):
                raise AssertionError(f"{len(row)} pages hold {self.tokens} tokens of a row")
            for slot in row:
                owners[slot] += 1
        if owners != self._owners:
            raise AssertionError(f"slots have {owners} owners, noted are {self._owners}")
        if sorted(self._free) != [slot for slot, count in enumerate(owners) if not count]:
            raise AssertionError(f"slots {self._free} are noted as free, owners are {owners}")

    def _take(self) -> int:
        if self._free:
            slot = self._free.pop()
            self._owners[slot] = 1
        else:
            slot = len(self._owners)
            self._owners.append(1)
        return slot

    def _own(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._owners[slot] += 1

    def _disown(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._owners[slot] -= 1
            if not self._owners[slot]:
                self._free.append(slot)
