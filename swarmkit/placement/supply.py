"""How many tokens per second a placement carries, and how many any placement could. Pure.

A server does a certain amount of work per second, in blocks x tokens: its throughput times its blocks. It may
spend it on any of its blocks, since routes may use it for any part of what it holds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from swarmkit.placement.description import Demand, Served

_STEPS = 40
"""Halvings of the interval in which the greatest rate lies."""


def block_throughputs(num_blocks: int, servers: Iterable[Served]) -> list[float]:
    """For every block, the sum of the throughputs of the servers that hold it: T in the papers."""
    return [float(total) for total in _totals(num_blocks, list(servers), [])]


def session_throughputs(
    num_blocks: int, servers: Iterable[Served], demand: Demand, answer_s: float
) -> list[float]:
    """As `block_throughputs`, where a server counts for no more than what its caches have room for.

    Caches of n sessions, each of which lasts `answer_s` seconds, take n / answer_s answers per second
    (Little's law).
    """
    listed = list(servers)
    most = [cached_rate(server.cache_tokens, demand, answer_s) for server in listed]
    return [float(total) for total in _totals(num_blocks, listed, most)]


def cached_rate(cache_tokens: float, demand: Demand, answer_s: float) -> float:
    """Tokens per second for which caches of so many tokens per block have room."""
    if math.isinf(cache_tokens):
        return math.inf
    sessions = math.floor(cache_tokens / demand.reserved_tokens + 1e-9)
    return sessions * demand.answer_tokens / max(answer_s, 1e-9)


def _totals(num_blocks: int, servers: Sequence[Served], most: Sequence[float]) -> NDArray[np.float64]:
    totals = np.zeros(num_blocks)
    limits: Iterable[float] = most or (math.inf for _ in servers)
    for server, limit in zip(servers, limits, strict=True):
        totals[max(0, server.start) : max(0, min(server.stop, num_blocks))] += min(server.throughput, limit)
    return totals


def greatest_rate(num_blocks: int, servers: Sequence[Served]) -> float:
    """The maximum flow: tokens per second that pass through all blocks, if the work is shared best.

    Whether a rate is possible is found by taking the blocks in order, and for each the servers that end
    first: runs of blocks are intervals, for which this is exact (Glover 1967, convex bipartite graphs).
    """
    listed = [one for one in servers if one.start < one.stop and one.throughput > 0]
    by_start = sorted(listed, key=lambda one: one.start)
    high = sum(one.throughput * one.blocks for one in listed) / num_blocks
    if not high or _carries(high, num_blocks, by_start):
        return high
    low = 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _carries(middle, num_blocks, by_start) else (low, middle)
    return low


def carries(rate: float, num_blocks: int, servers: Sequence[Served]) -> bool:
    """Whether so many tokens per second pass through all blocks."""
    return _carries(rate, num_blocks, sorted(servers, key=lambda one: one.start))


def _carries(rate: float, num_blocks: int, by_start: Sequence[Served]) -> bool:
    heap: list[tuple[int, int]] = []  # (stop, number) of servers that hold the block and have work left
    left = [one.throughput * one.blocks for one in by_start]
    coming = 0
    for block in range(num_blocks):
        while coming < len(by_start) and by_start[coming].start <= block:
            heapq.heappush(heap, (by_start[coming].stop, coming))
            coming += 1
        needed = rate * (1 - 1e-12)
        while needed > 0:
            while heap and heap[0][0] <= block:
                heapq.heappop(heap)
            if not heap:
                return False
            number = heap[0][1]
            taken = min(needed, left[number])
            needed -= taken
            left[number] -= taken
            if left[number] <= 0:
                heapq.heappop(heap)
    return True


def greatest_rate_of_any(num_blocks: int, machines: Iterable[tuple[int, float]]) -> float:
    """No placement carries more tokens per second than this.

    The maximum flow from machines to blocks if each could hold any of them, at most so many: a machine does
    no more work than it can, and at a rate T no more than T for each of its blocks.

    Args: machines: of each the most blocks that it can hold, and its work per second (blocks x tokens).
    """
    limits = sorted((work / most, most, work) for most, work in machines if most > 0)
    slope, fixed = float(sum(most for _, most, _ in limits)), 0.0
    if slope < num_blocks:
        return 0.0
    best = math.inf
    for _, most, work in limits:  # as T grows, one machine after the other is at its limit
        slope, fixed = slope - most, fixed + work
        if slope < num_blocks:
            best = min(best, fixed / (num_blocks - slope))
    return best
