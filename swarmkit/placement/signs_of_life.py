"""Which servers are asked for a sign of life before a server decides where to serve. Pure.

A server that crashed stays in the shared table until its announcement ends, which takes several of its
periods, so that one lost message withdraws nothing. If it was the only one of some block, there is no route
meanwhile. Those that could take its place therefore ask others whether they are there, instead of believing
the table.

Who was found gone is remembered until it announces itself anew. A server looks twice before it moves, and
asks others each time: if it believed the table again of those that it does not ask the second time, both
looks would show it different swarms, and it would go nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import numpy as np

ASKERS = 8
"""About so many servers ask the same one at each turn, however large the swarm is."""

_SEVERAL = 3
_ALL_ABOVE = 0.5
"""Who would ask a larger share of the others asks all of them, and knows after one turn."""

Announced = tuple[str, int]
"""The name of a server, and the number of its announcement."""


class HeldBlocks(Protocol):
    """Blocks [start, stop)."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


def to_ask(
    num_blocks: int,
    servers: Sequence[HeldBlocks],
    asked: Collection[int],
    silent: Collection[int],
    chance: Callable[[], float],
) -> list[int]:
    """The servers, by their place in the list, that this one asks next; none = it knows enough.

    First some that are drawn. Where one of them does not answer, others may have gone with it: those that are
    the only ones of some block without it are asked as well.

    Args:
        asked: servers that were asked already.
        silent: those of them that did not answer.
        chance: draws from 0 to 1.
    """
    if not asked:
        share = ASKERS / max(len(servers), 1)
        if share > _ALL_ABOVE:
            return list(range(len(servers)))
        return [number for number in range(len(servers)) if chance() < share]
    if not silent:
        return []
    present = [number for number in range(len(servers)) if number not in silent]
    alone = without_replica(num_blocks, [servers[number] for number in present])
    return [present[number] for number in alone if present[number] not in asked]


def gone(asked: Collection[int], silent: Collection[int]) -> Collection[int]:
    """The servers that count as gone.

    Where several were asked and nobody answered, the network of the one that asks is the likelier cause, and
    nothing is concluded.
    """
    return () if len(silent) == len(asked) >= _SEVERAL else silent


class GoneServers:
    """Remembers, look after look, which servers are gone: until they announce themselves anew."""

    def __init__(self) -> None:
        self._known: set[Announced] = set()

    def among(self, servers: Sequence[Announced]) -> set[int]:
        """Those that are known to be gone, by their place in the list of all."""
        self._known.intersection_update(servers)
        return {number for number, one in enumerate(servers) if one in self._known}

    def note(self, servers: Iterable[Announced]) -> None:
        """These were found gone."""
        self._known.update(servers)


def without_replica(num_blocks: int, servers: Sequence[HeldBlocks]) -> list[int]:
    """The servers, by their place in the list, that are the only ones of some block."""
    changes = np.zeros(num_blocks + 1, dtype=np.int64)
    for one in servers:
        changes[min(one.start, num_blocks)] += 1
        changes[min(one.stop, num_blocks)] -= 1
    is_alone = np.cumsum(changes)[:num_blocks] == 1
    alone_before = np.concatenate([[0], np.cumsum(is_alone)])
    return [
        number
        for number, one in enumerate(servers)
        if alone_before[min(one.stop, num_blocks)] > alone_before[min(one.start, num_blocks)]
    ]
