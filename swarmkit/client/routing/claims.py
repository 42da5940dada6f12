"""What is a server's word about its speed worth? No more than what servers have shown. Pure.

A claim costs nothing. It orders servers as long as none has shown anything to this client. From then on a
server that has not shown anything counts as no faster, for each block, than the best of those that have, and
comes after them where they are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_UNKNOWN = 1.25
"""A server that has shown nothing counts as so many times slower than the best of those that have."""
_BROKEN = 10.0
"""So many times slower than it claims, a server has not kept its word."""
_BROKEN_COSTS = 2.0
_PROMISING = 0.5
"""A claim is tried out if it promises to take less than this share of what is used now."""


@dataclass(frozen=True)
class Shown:
    """What a server has shown to this client.

    Attributes:
        seconds: of a token, the way there and back included.
        blocks: that it went through.
        way_s: seconds of the way there and back, as far as they are known.
    """

    seconds: float
    blocks: int
    way_s: float = 0.0


def best_per_block(shown: Iterable[Shown]) -> float:
    """Seconds per block of the best of some servers; 0 if there is none."""
    return min((one.seconds / max(one.blocks, 1) for one in shown), default=0.0)


def counted_per_block(claimed_work_s: float, shown: Shown) -> float:
    """Seconds per block with which a server counts that has shown something; see `believed_s`.

    Where all servers are slower than they claim, as on busy machines, those that have shown nothing must not
    come before them for that.

    Args: claimed_work_s: of the blocks that it has shown, as it claims, without the way.
    """
    return believed_s(0.0, claimed_work_s, shown.blocks, shown, 0.0) / max(shown.blocks, 1)


def believed_s(claimed_s: float, work_s: float, blocks: int, shown: Shown | None, best_s: float) -> float:
    """Seconds that a token is expected to take at a server for so many blocks, the way included.

    Args:
        claimed_s: seconds as the server claims, the way included.
        work_s: those of them without the way.
        shown: what it has shown, if anything.
        best_s: the least of `counted_per_block` of those that have shown something; 0 = none has.
    """
    if shown is None:
        return max(claimed_s, best_s * blocks) * _UNKNOWN if best_s else claimed_s
    seconds = shown.seconds * max(1.0, blocks / max(shown.blocks, 1))
    is_broken = (seconds - shown.way_s) > _BROKEN * work_s and shown.seconds > 2 * shown.way_s
    return seconds * _BROKEN_COSTS if is_broken else seconds


def is_promising(claimed_s: float, present_s: float) -> bool:
    """Whether a server that has shown nothing is worth a trial.

    Args:
        claimed_s: seconds that a token takes there, as it claims.
        present_s: seconds that it takes where it would go now.
    """
    return claimed_s < _PROMISING * present_s
