"""The rule of Petals for choosing blocks and for moving (Borzunov et al., NeurIPS 2023, section 3.3).

It knows of each server one number, its throughput, and counts the swarm's as that of its weakest block.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from swarmkit.errors import UsageError
from swarmkit.placement.description import Served
from swarmkit.placement.supply import block_throughputs

BALANCE_QUALITY = 0.75
"""A server moves if the swarm's throughput is below this share of what it would be afterwards."""
_STAYING = 1 + 1e-3
"""A server that is taken away counts a little more than it is worth, so that it rather comes back."""


def choose_blocks(num_blocks: int, count: int, servers: Iterable[Served]) -> tuple[int, int]:
    """The window of `count` blocks whose worst block is worst, ties broken by the next worst.

    Among all starts i, the smallest sorted vector of block throughputs T[i..i+count) in lexicographic order;
    the leftmost such i.

    Raises:
        UsageError: `count` is not in 1..num_blocks.
    """
    if not 1 <= count <= num_blocks:
        raise UsageError(f"a server can hold 1 to {num_blocks} blocks of this model, not {count}")
    return weakest_window(np.array(block_throughputs(num_blocks, servers)), count)


def weakest_window(totals: NDArray[np.float64], count: int) -> tuple[int, int]:
    """As `choose_blocks`, by the throughputs of all blocks."""
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(totals, count), axis=1)
    left = np.arange(len(windows))
    for column in range(count):
        values = windows[left, column]
        left = left[values == values.min()]
        if len(left) == 1:
            break
    return int(left[0]), int(left[0]) + count


def should_move(
    num_blocks: int,
    own: int,
    servers: Sequence[Served],
    *,
    balance_quality: float = BALANCE_QUALITY,
    chance: random.Random,
) -> bool:
    """Whether a server goes elsewhere: Petals' rule, which lets all others follow in thought.

    Args:
        own: which of `servers` decides.
        balance_quality: 0 = never move; above 1 = always.
        chance: draws the order in which the others follow.
    """
    if balance_quality > 1:
        return True
    spans = list(servers)
    totals = np.array(block_throughputs(num_blocks, spans))
    present = totals.min()
    first = servers[own]
    without = totals.copy()
    without[first.start : first.stop] -= first.throughput * _STAYING
    if present > 1e-9 and without.min() <= 1e-9:
        return False  # a block would be without a server
    if weakest_window(without, first.blocks)[0] == first.start:
        return False
    _place_again(own, spans, totals)
    order = list(range(len(spans)))
    moved = True
    while moved:
        moved = False
        chance.shuffle(order)
        for number in order:
            moved |= _place_again(number, spans, totals)
    return bool(present < (balance_quality - 1e-9) * totals.min())


def _place_again(number: int, spans: list[Served], totals: NDArray[np.float64]) -> bool:
    """Let one server choose anew; returns whether it moves."""
    old = spans[number]
    totals[old.start : old.stop] -= old.throughput * _STAYING
    start, stop = weakest_window(totals, old.blocks)
    totals[old.start : old.stop] += old.throughput * (_STAYING - 1)
    totals[start:stop] += old.throughput
    spans[number] = replace(old, start=start, stop=stop)
    return start != old.start
