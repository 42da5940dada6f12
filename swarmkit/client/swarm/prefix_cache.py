"""Hidden states of sessions that have ended: a session with the same first tokens need not send them again.

At every boundary of the route that a session took, its hidden states are kept. With these a later session
asks each server which pages it has kept (`models.pages`), sends only the rest, and can still rebuild the
cache of any server that is lost.

What servers computed is used only with the same servers in the same places of a route: a server that lies
deceives the sessions that use it, and no others. What a server took part in is dropped when it is banned.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.kv.pages import Name, names_of

Chain: TypeAlias = tuple[tuple[str, int, int], ...]
"""The servers that a session's tokens went through, in order: service id, and blocks [start, stop)."""


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """One session's hidden states `[tokens, hidden]` at the block boundaries of its route, both ends too."""

    chain: Chain
    names: tuple[Name, ...]
    states: Mapping[int, Tensor]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.states)


@dataclass(frozen=True, eq=False)
class _NewPrefix:
    chain: Chain
    states: Mapping[int, Tensor]
    inputs: Tensor


class ClientPrefixCache:
    """Prefixes of sessions of one model, within `limit` bytes; the least recently used are dropped first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._new: deque[_NewPrefix] = deque()
        self._lock = threading.Lock()  # held for moments only: nothing is hashed meanwhile
        self._entries: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._by_name: dict[Name, CachedPrefix] = {}
        self._nbytes = 0

    @property
    def enabled(self) -> bool:
        return self._limit > 0

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes + self._new_nbytes()

    def __len__(self) -> int:
        return len(self._entries) + len(self._new)

    def keep(self, chain: Chain, states: Mapping[int, Tensor], inputs: Tensor | None = None) -> None:
        """Keep a session by its states `[tokens, hidden]`, of equal length at all boundaries. Is quick.

        Args:
            chain: the servers that computed all of these states.
            inputs: by which it is found, where a codec made others of them at the first boundary.
        """
        if min(map(len, states.values())) < PAGE_TOKENS or _nbytes(states) > self._limit:
            return
        with self._lock:
            self._new.append(_NewPrefix(chain, states, states[min(states)] if inputs is None else inputs))
            while self._new_nbytes() > self._limit:
                self._new.popleft()

    def drop(self, service_id: str) -> None:
        """Forget all that a server took part in. Is quick; may be called from any thread."""
        with self._lock:
            self._new = deque(new for new in self._new if not _uses(new.chain, service_id))
            for entry in [entry for entry in self._entries if _uses(entry.chain, service_id)]:
                self._forget(entry)

    def clear(self) -> None:
        """Forget everything. Is quick; may be called from any thread."""
        with self._lock:
            self._new.clear()
            self._entries.clear()
            self._by_name.clear()
            self._nbytes = 0

    def _new_nbytes(self) -> int:
        return sum(_nbytes(new.states) for new in self._new)

    def chains(self, start: int, stop: int, most: int) -> list[Chain]:
        """The servers of kept sessions over blocks [start, stop), the latest used first, each once."""
        with self._lock:
            kept = [*(entry.chain for entry in self._entries), *(new.chain for new in self._new)]
        found = dict.fromkeys(reversed(kept))
        return [each for each in found if each and (each[0][1], each[-1][2]) == (start, stop)][:most]

    def find(self, chain: Chain, inputs: Tensor) -> tuple[CachedPrefix, int] | None:
        """The session over the same servers that shares most full pages with `inputs`, `[tokens, hidden]`.

        Takes time, for what is new and for the inputs; may be called from any thread.

        Returns: it, and the number of tokens shared; None if it shares none.
        """
        with self._lock:
            waiting = tuple(self._new)
        for new in waiting:
            names = tuple(_names(new.chain, new.inputs))
            with self._lock:
                if new in self._new:  # and was not dropped, nor found by another call, meanwhile
                    self._new.remove(new)
                    self._absorb(CachedPrefix(new.chain, names, new.states))
        names = tuple(_names(chain, inputs))
        with self._lock:
            for count, name in reversed(list(enumerate(names, start=1))):
                entry = self._by_name.get(name)
                if entry is not None:
                    self._entries.move_to_end(entry)
                    return entry, count * PAGE_TOKENS
            return None

    def _absorb(self, entry: CachedPrefix) -> None:
        for name in entry.names:  # what this one goes on from says nothing that this one does not say
            before = self._by_name.get(name)
            if before is not None and before.names == entry.names[: len(before.names)]:
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


def _names(chain: Chain, inputs: Tensor) -> list[Name]:
    return names_of(repr(chain).encode(), inputs)


def _uses(chain: Chain, service_id: str) -> bool:
    return any(server == service_id for server, _, _ in chain)


def _nbytes(states: Mapping[int, Tensor]) -> int:
    # Parts of larger buffers, which stay as long as these do.
    return sum(part.untyped_storage().nbytes() for part in states.values())


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
