"""Every byte of keys, values and states is leased by a session, kept for later sessions, or free.

::

    capacity = sum of leases + kept pages + free        (what `audit` checks)

A lease grows with its session's cache, one page at a time, and not by what the session declared that it might
need. It counts the pages that the cache really has: rows that share pages (beams) count them once. Pages are
kept only where no lease needs the room, and count as free.

The capacity may be reduced below what is leased. Leases then stay as they are, none of them grows, and what
is released is gone until the leases fit again.
"""

from __future__ import annotations

from swarmkit.errors import SwarmkitError
from swarmkit.models.kv.page_table import PAGE_TOKENS, pages_for
from swarmkit.server.cache.prefix_cache import PrefixCache


class CacheFullError(SwarmkitError):
    """The budget has no room for a session to grow; `lacking_bytes` more would be needed."""

    def __init__(self, message: str, lacking_bytes: int) -> None:
        super().__init__(message)
        self.lacking_bytes = lacking_bytes


class CacheLease:
    """The bytes of a budget that one session holds."""

    def __init__(self, budget: KVBudget, bytes_per_token: int, extra_bytes: int) -> None:
        self._budget = budget
        self._bytes_per_token = bytes_per_token
        self._extra_bytes = extra_bytes
        self.nbytes = 0
        self.released = False

    def resize(self, rows: int, tokens: int, pages: int | None = None) -> None:
        """Hold what `rows` x `tokens` need.

        Args: pages: the pages of all rows, where some are shared; None: every row has its own.

        Raises:
            CacheFullError: the budget has less than that left; the lease stays as it was.
        """
        self._budget._set(self, self.needed(rows, tokens, pages))

    def grow(self, rows: int, tokens: int, pages: int | None = None) -> None:
        """Like `resize`, but never holds less than before."""
        self._budget._set(self, max(self.nbytes, self.needed(rows, tokens, pages)))

    def needed(self, rows: int, tokens: int, pages: int | None = None) -> int:
        """Return the bytes that `resize` would hold."""
        if not tokens:
            return 0
        if pages is None:
            pages = rows * pages_for(tokens)
        of_rows = (rows * self._budget.row_tokens + pages * PAGE_TOKENS) * self._bytes_per_token
        return of_rows + self._extra_bytes

    def release(self) -> None:
        """Give everything back. May be called twice."""
        self._budget._release(self)


class KVBudget:
    """A number of bytes that sessions share. All but its pages is used by the event loop's thread only.

    Attributes:
        row_tokens: the memory of a row besides its tokens, in tokens: the states of recurrent blocks.
        pages: the pages that are kept in bytes without a lease.
    """

    def __init__(self, capacity_bytes: int, row_tokens: int = 0) -> None:
        self._capacity_bytes = capacity_bytes
        self._overdrawn_to = 0  # what was leased when the capacity became less than that
        self.row_tokens = row_tokens
        self._leases: set[CacheLease] = set()
        self._leased_bytes = 0
        self.pages = PrefixCache(capacity_bytes)

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def leased_bytes(self) -> int:
        return self._leased_bytes

    @property
    def free_bytes(self) -> int:
        """How many bytes can be leased; kept pages make room."""
        return max(0, self._capacity_bytes - self._leased_bytes)

    @property
    def overdrawn_bytes(self) -> int:
        """How many bytes are leased beyond the capacity, because the capacity was reduced."""
        return max(0, self._leased_bytes - self._capacity_bytes)

    def set_capacity(self, capacity_bytes: int) -> None:
        """Share another number of bytes from now on. Kept pages that no longer fit are dropped at once."""
        self._capacity_bytes = capacity_bytes
        self._overdrawn_to = self._leased_bytes
        self.pages.set_limit(self.free_bytes)

    def lease(self, bytes_per_token: int, extra_bytes: int = 0) -> CacheLease:
        """An empty lease for a session whose cache takes `bytes_per_token` for one token of one row.

        Args: extra_bytes: what it takes besides, as soon as it holds anything.
        """
        lease = CacheLease(self, bytes_per_token, extra_bytes)
        self._leases.add(lease)
        return lease

    def audit(self) -> None:
        """Raise AssertionError unless every byte is accounted for."""
        total = sum(lease.nbytes for lease in self._leases)
        if total != self._leased_bytes or not 0 <= total <= max(self._capacity_bytes, self._overdrawn_to):
            raise AssertionError(f"leases add up to {total}, the budget says {self._leased_bytes}")
        self.pages.audit()
        if self.pages.nbytes > self.free_bytes:
            raise AssertionError(f"{total} leased and {self.pages.nbytes} kept are more than there is")

    def _set(self, lease: CacheLease, nbytes: int) -> None:
        if lease.released:
            raise AssertionError("a released lease cannot grow")
        growth = nbytes - lease.nbytes
        if growth > max(0, left := self._capacity_bytes - self._leased_bytes):
            raise CacheFullError(
                f"the cache has {max(0, left)} of {self._capacity_bytes} bytes left, {growth} are needed",
                growth - left,
            )
        if growth:
            self.pages.set_limit(max(0, left - growth))
        lease.nbytes = nbytes
        self._leased_bytes += growth
        self._overdrawn_to = min(self._overdrawn_to, self._leased_bytes)

    def _release(self, lease: CacheLease) -> None:
        if not lease.released:
            self._set(lease, 0)
            lease.released = True
            self._leases.discard(lease)
