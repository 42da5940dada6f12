"""Ranges of blocks: as people write them, and what they leave uncovered."""

from __future__ import annotations

from collections.abc import Iterable

from swarmkit.errors import UsageError


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


def uncovered(start: int, stop: int, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of [start, stop) outside every range, as ranges."""
    gaps: list[tuple[int, int]] = []
    position = start
    for low, high in sorted(ranges):
        if low > position:
            gaps.append((position, min(low, stop)))
        position = max(position, high)
        if position >= stop:
            break
    if position < stop:
        gaps.append((position, stop))
    return [(low, high) for low, high in gaps if low < high]
