"""Ranges of blocks as people write them."""

from __future__ import annotations

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
