"""Which blocks should a newcomer serve? Pure: plain numbers in, a range out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swarmkit.errors import UsageError


@dataclass(frozen=True)
class Served:
    """Blocks [start, stop) served at `throughput` tokens per second."""

    start: int
    stop: int
    throughput: float


def block_throughputs(num_blocks: int, servers: Iterable[Served]) -> list[float]:
    """For every block, the sum of the throughputs of the servers that hold it."""
    totals = [0.0] * num_blocks
    for server in servers:
        for block in range(max(0, server.start), min(server.stop, num_blocks)):
            totals[block] += server.throughput
    return totals


def choose_blocks(num_blocks: int, count: int, servers: Iterable[Served]) -> tuple[int, int]:
    """The window of `count` blocks whose worst block is worst, ties broken by the next worst.

    The rule of Petals (Borzunov et al., NeurIPS 2023, section 3.3): among all starts i, the smallest
    sorted vector of block throughputs T[i..i+count) in lexicographic order; the leftmost such i.

    Raises:
        UsageError: `count` is not in 1..num_blocks.
    """
    if not 1 <= count <= num_blocks:
        raise UsageError(f"a server can hold 1 to {num_blocks} blocks of this model, not {count}")
    totals = block_throughputs(num_blocks, servers)
    windows: Sequence[tuple[list[float], int]] = [
        (sorted(totals[start : start + count]), start) for start in range(num_blocks - count + 1)
    ]
    _, start = min(windows)
    return start, start + count


def parse_blocks(text: str, num_blocks: int) -> tuple[int, int]:
    """Read a range as people write it: `"4:8"` is the blocks 4, 5, 6 and 7; `":4"` and `"4:"` work too.

    Raises:
        UsageError: not such a range, or not inside the model.
    """
    low, colon, high = text.partition(":")
    try:
        start, stop = int(low or 0), int(high or num_blocks)
    except ValueError:
        colon = ""
        start = stop = 0
    if not colon:
        raise UsageError(f"blocks are written A:B, for example 0:{num_blocks}; got {text!r}")
    if not 0 <= start < stop <= num_blocks:
        raise UsageError(f"blocks {text} are not inside this model's 0:{num_blocks}")
    return start, stop
