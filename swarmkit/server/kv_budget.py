"""Every byte of keys, values and states is leased by a session or free; nothing else.

::

    capacity = free + sum of leases        (what `audit` checks)

A lease grows as its session's cache does, a page at a time, rather than by what the session declared it might
need.
"""

from __future__ import annotations

from swarmkit.errors import SwarmkitError
from swarmkit.models.cache import PAGE_TOKENS


class CacheFullError(SwarmkitError):
    """The budget has no room left for a session to grow."""


class Lease:
    """One session's share of a budget."""

    def __init__(self, budget: KVBudget, bytes_per_token: int) -> None:
        self._budget = budget
        self._bytes_per_token = bytes_per_token
        self.nbytes = 0
        self.released = False

    def resize(self, rows: int, tokens: int) -> None:
        """Hold what `rows` x `tokens` need, rounded up to pages.

        Raises:
            CacheFullError: the budget has not that much left; the lease stays as it was.
        """
        self._budget._set(self, self._needed(rows, tokens))

    def grow(self, rows: int, tokens: int) -> None:
        """Like `resize`, but never holds less than before."""
        self._budget._set(self, max(self.nbytes, self._needed(rows, tokens)))

    def _needed(self, rows: int, tokens: int) -> int:
        if not tokens:
            return 0
        pages = -(-tokens // PAGE_TOKENS)
        return rows * (self._budget.row_tokens + pages * PAGE_TOKENS) * self._bytes_per_token

    def release(self) -> None:
        """Give everything back. May be called twice."""
        self._budget._release(self)


class KVBudget:
    """A number of bytes that sessions share. Used by the event loop's thread only.

    Attributes:
        row_tokens: what a row takes besides its tokens, in tokens: the states of recurrent blocks.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.row_tokens = 0
        self._leases: set[Lease] = set()
        self._leased_bytes = 0

    @property
    def leased_bytes(self) -> int:
        return self._leased_bytes

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self._leased_bytes

    def lease(self, bytes_per_token: int) -> Lease:
        """An empty lease for a session whose cache takes `bytes_per_token` for one token of one row."""
        lease = Lease(self, bytes_per_token)
        self._leases.add(lease)
        return lease

    def audit(self) -> None:
        """Raise AssertionError unless every byte is accounted for."""
        total = sum(lease.nbytes for lease in self._leases)
        if total != self._leased_bytes or not 0 <= total <= self.capacity_bytes:
            raise AssertionError(f"leases add up to {total}, the budget says {self._leased_bytes}")

    def _set(self, lease: Lease, nbytes: int) -> None:
        if lease.released:
            raise AssertionError("a released lease cannot grow")
        growth = nbytes - lease.nbytes
        if growth > self.free_bytes:
            raise CacheFullError(
                f"the cache has {self.free_bytes} of {self.capacity_bytes} bytes left, {growth} are needed"
            )
        lease.nbytes = nbytes
        self._leased_bytes += growth

    def _release(self, lease: Lease) -> None:
        if not lease.released:
            self._set(lease, 0)
            lease.released = True
            self._leases.discard(lease)
