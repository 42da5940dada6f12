"""How long a token takes over the best route of a placement. Pure.

A token that visits server i for m blocks spends `way_s` + m x `block_s` there; the best route is the shortest
path over (server, block), found by one sweep over the blocks for all servers together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swarmkit.placement.description import Served

Floats = NDArray[np.float64]


class RouteTimes:
    """Seconds of the best routes to and from every block boundary; O(servers x blocks), vectorised."""

    def __init__(self, num_blocks: int, servers: Sequence[Served]) -> None:
        self.num_blocks = num_blocks
        starts = np.array([one.start for one in servers], dtype=np.int64)
        stops = np.array([one.stop for one in servers], dtype=np.int64)
        ways = np.array([one.way_s for one in servers])
        each = np.array([one.block_s for one in servers])
        self.to = _sweep(num_blocks, starts, stops, ways, each)
        """[num_blocks + 1]: seconds until a token is through the first blocks; inf = no route."""
        self.beyond = _sweep(num_blocks, num_blocks - stops, num_blocks - starts, ways, each)[::-1]
        """[num_blocks + 1]: seconds that a token takes through the blocks from here on."""

    @property
    def seconds(self) -> float:
        """Of a token through all blocks; inf if some block has no server."""
        return float(self.to[-1])

    def with_one_more(self, count: int, way_s: float, block_s: float) -> Floats:
        """Seconds of a token if one more server held `count` blocks, for each of its possible starts.

        It is visited once, for any part: min over s <= low < high <= s + count of
        to[low] + way_s + (high - low) block_s + beyond[high]. A route that leaves it and comes back may be
        faster, where another server is much faster for a few blocks in between; that is not looked for.
        """
        boundaries = np.arange(self.num_blocks + 1)
        enter = self.to - boundaries * block_s
        leave = self.beyond + boundaries * block_s
        starts = self.num_blocks - count + 1
        best = np.full(starts, self.seconds)
        lowest = np.full(starts, np.inf)
        for offset in range(count):
            lowest = np.minimum(lowest, enter[offset : offset + starts])
            best = np.minimum(best, lowest + way_s + leave[offset + 1 : offset + 1 + starts])
        return best


def _sweep(
    num_blocks: int, starts: NDArray[np.int64], stops: NDArray[np.int64], ways: Floats, each: Floats
) -> Floats:
    best = np.full(num_blocks + 1, np.inf)
    best[0] = 0.0
    if not len(starts):
        return best
    inside = np.full(len(starts), np.inf)  # seconds until a token has left the block, being at the server
    for block in range(num_blocks):
        holds = (starts <= block) & (block < stops)
        inside = np.where(holds, np.minimum(inside, best[block] + ways) + each, np.inf)
        best[block + 1] = inside.min()
    return best
