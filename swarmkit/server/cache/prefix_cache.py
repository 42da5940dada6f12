"""Full pages of sessions, kept after use for later sessions that begin alike.

A page is the keys and values of `PAGE_TOKENS` tokens in some blocks, and the output of these blocks. Its name
(`models.kv.pages`) is a hash of all their inputs up to its end, so that it fits only where everything before
it was the same. The name also depends on the client whose pages a session may find (`root_of`).

Pages take the memory that the leases of sessions leave, and give it back, least recently used first, as soon
as a session needs it. Used on the engine's thread and on the event loop's.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.kv.pages import Name


@dataclass(frozen=True, eq=False)
class Page:
    """Keys and values of each block, `[1, heads, PAGE_TOKENS, dim]`, and output, `[PAGE_TOKENS, hidden]`."""

    states: tuple[tuple[Tensor, Tensor], ...]
    output: Tensor

    @property
    def nbytes(self) -> int:
        return self.output.nbytes + sum(part.nbytes for pair in self.states for part in pair)


def root_of(owner: str, start: int, stop: int) -> Name:
    """Return the root of the names of pages of blocks [start, stop).

    Args: owner: the client whose sessions may find the pages; "" for all clients.
    """
    return hashlib.sha256(f"swarmkit pages 1\n{owner}\n{start}:{stop}".encode()).digest()


class PrefixCache:
    """Pages by name, within `limit` bytes; the least recently used are dropped first."""

    def __init__(self, limit: int = 0) -> None:
        self._lock = threading.Lock()
        self._pages: OrderedDict[Name, Page] = OrderedDict()
        self._limit = limit
        self._nbytes = 0
        self.found_tokens = 0
        """Tokens that were found here and not computed again, since the start."""

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, name: Name) -> bool:
        return name in self._pages

    def set_limit(self, limit: int) -> None:
        """Take `limit` bytes at most from now on, and drop pages beyond that at once."""
        with self._lock:
            self._limit = limit
            self._shrink(limit)

    def put(self, name: Name, page: Page) -> None:
        """Keep a page as the most recently used one, if it fits at all."""
        with self._lock:
            if name in self._pages or page.nbytes > self._limit:
                return
            self._shrink(self._limit - page.nbytes)
            self._pages[name] = page
            self._nbytes += page.nbytes

    def find(self, names: Sequence[Name]) -> list[Page]:
        """Return the pages of `names`, up to the first one that is not here."""
        with self._lock:
            found = []
            for name in names:
                page = self._pages.get(name)
                if page is None:
                    break
                found.append(page)
            # The last page of a text is of no use without those before it, so it is dropped first.
            for name in reversed(names[: len(found)]):
                self._pages.move_to_end(name)
            self.found_tokens += len(found) * PAGE_TOKENS
            return found

    def clear(self) -> None:
        """Drop all pages."""
        with self._lock:
            self._shrink(0)

    def audit(self) -> None:
        """Raise AssertionError unless every byte is accounted for."""
        with self._lock:
            total = sum(page.nbytes for page in self._pages.values())
            if total != self._nbytes or total > self._limit:
                raise AssertionError(f"pages add up to {total}, noted are {self._nbytes} of {self._limit}")

    def _shrink(self, nbytes: int) -> None:
        while self._nbytes > nbytes and self._pages:
            _, page = self._pages.popitem(last=False)
            self._nbytes -= page.nbytes
