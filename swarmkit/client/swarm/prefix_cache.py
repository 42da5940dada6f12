"""Hidden states of sessions that have ended: a session with the same first tokens need not send them again.

At every boundary of the route that a session took, its hidden states are kept. With these a later session
asks each server which pages it has kept (`models.pages`), sends only the rest, and can still rebuild the
cache of any server that is lost.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.kv.pages import Name, names_of


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """One session's hidden states `[tokens, hidden]` at the block boundaries of its route, both ends too."""

    names: tuple[Name, ...]
    states: Mapping[int, Tensor]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.states)


class ClientPrefixCache:
    """Prefixes of sessions of one model, within `limit` bytes; the least recently used are dropped first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._new: deque[tuple[Mapping[int, Tensor], Tensor]] = deque()
        self._lock = threading.Lock()
        self._entries: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._by_name: dict[Name, CachedPrefix] = {}
        self._nbytes = 0

    @property
    def enabled(self) -> bool:
        return self._limit > 0

    @property
    def nbytes(self) -> int:
        return self._nbytes + self._new_nbytes()

    def __len__(self) -> int:
        return len(self._entries) + len(self._new)

    def keep(self, states: Mapping[int, Tensor], inputs: Tensor | None = None) -> None:
        """Keep a session by its states `[tokens, hidden]`, of equal length at all boundaries. Is quick.

        Args: inputs: by which it is found, where a codec made others of them at the first boundary.
        """
        if min(map(len, states.values())) >= PAGE_TOKENS and _nbytes(states) <= self._limit:
            self._new.append((states, states[min(states)] if inputs is None else inputs))
        while self._new_nbytes() > self._limit:
            self._new.popleft()

    def _new_nbytes(self) -> int:
        return sum(_nbytes(states) for states, _ in self._new)

    def find(self, inputs: Tensor, boundaries: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """The session that shares most full pages with `inputs`, `[tokens, hidden]` at the first boundary.

        Takes time, for what is new and for the inputs; may be called from any thread.

        Returns: it, and the number of tokens shared; None if it shares none or took other boundaries.
        """
        with self._lock:
            with contextlib.suppress(IndexError):  # until there is no more
                while True:
                    self._absorb(*self._new.popleft())
            names = _names(boundaries[0], inputs)
            for count, name in reversed(list(enumerate(names, start=1))):
                entry = self._by_name.get(name)
                if entry is not None and set(boundaries) <= entry.states.keys():
                    self._entries.move_to_end(entry)
                    return entry, count * PAGE_TOKENS
            return None

    def _absorb(self, states: Mapping[int, Tensor], inputs: Tensor) -> None:
        entry = CachedPrefix(tuple(_names(min(states), inputs)), states)
        for name in entry.names:  # what this one goes on from says nothing that this one does not say
            before = self._by_name.get(name)
            if before is not None and _goes_on_from(entry, before):
                self._forget(before)
        self._entries[entry] = None
        self._by_name.update(dict.fromkeys(entry.names, entry))
        self._nbytes += entry.nbytes
        while self._nbytes > self._limit:
            self._forget(next(iter(self._entries)))

    def _forget(self, entry: CachedPrefix) -> None:
        del self._entries[entry]
        self._nbytes -= entry.nbytes
        for name in entry.names:
            if self._by_name.get(name) is entry:
                del self._by_name[name]


def _names(boundary: int, states: Tensor) -> list[Name]:
    return names_of(f"{boundary}".encode(), states)


def _nbytes(states: Mapping[int, Tensor]) -> int:
    # Parts of larger buffers, which stay as long as these do.
    return sum(part.untyped_storage().nbytes() for part in states.values())


def _goes_on_from(entry: CachedPrefix, before: CachedPrefix) -> bool:
    same_way = before.states.keys() <= entry.states.keys()
    return same_way and before.names == entry.names[: len(before.names)]


def names_for(root: bytes, states: Tensor, dtype: str) -> list[Name]:
    """The names by which a server knows pages of these states `[tokens, hidden]`."""
    return names_of(root, states.to(getattr(torch, dtype)))


def best_start(held: Sequence[int], known: int, tokens: int) -> int:
    """The token from which on a step of `tokens` is best sent: stages hold `held` tokens, the client `known`.

    Where all stages hold what comes before, they work on the rest at once; else one after the other, each on
    what it lacks.
    """

    def cost(begin: int) -> int:
        if all(count >= begin for count in held):
            return tokens - begin
        return sum(tokens - min(count, begin) for count in held)

    return min({0, known, *(count for count in held if count <= known)}, key=lambda b: (cost(b), -b))
