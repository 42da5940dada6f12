"""Which codec is worth its loss on a link? A pure function of what was measured, and of what the user allows.

A codec pays if it makes a step shorter by a tenth::

    step_s   all that a step takes                            as it was measured, its transfers included
    saved_s  (bytes as they are - bytes encoded) / bytes per second - time to encode and decode
    enter    saved_s >= 10 % of step_s                        leave: saved_s < 4 % of step_s

Between the two a link stays with what it has, so that noise in the measurements does not make it change back
and forth; it also does while its speed is not known.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from swarmkit.net.protocol.codec import CodecName, TensorSpec

_ENTER = 0.10
_LEAVE = 0.04

_COSTS: dict[CodecName, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "bfloat16": (50e-6, 3e-9),
    "float16": (50e-6, 3e-9),
    "int8": (250e-6, 30e-9),
}
"""Seconds to encode and decode, at both ends together: per message, and per value. Of slow processors."""


@dataclass(frozen=True)
class Transfer:
    """What is to go over a link.

    Attributes:
        values: so many of them, in a tensor whose last dimension is `width`.
        dtype: what they are in.
        step_s: what a step of this size takes in all.
        bytes_per_s: what the link carries; None = not known.
    """

    values: int
    width: int
    dtype: str
    step_s: float
    bytes_per_s: float | None

    def nbytes(self, codec: CodecName) -> int:
        """Bytes in that codec."""
        return TensorSpec((self.values // self.width, self.width), self.dtype, codec).nbytes  # type: ignore[arg-type]

    def saved_s(self, codec: CodecName) -> float:
        """By how much the step becomes shorter in that codec; the link's speed must be known."""
        assert self.bytes_per_s is not None
        per_message, per_value = _COSTS[codec]
        fewer = self.nbytes("none") - self.nbytes(codec)
        return fewer / self.bytes_per_s - per_message - per_value * self.values


def choose(allowed: Collection[CodecName], current: CodecName, transfer: Transfer) -> CodecName:
    """The codec for a link.

    Args:
        allowed: besides `none`, which always is.
        current: what it has now.
    """
    candidates = _shorter(allowed, transfer)
    if current not in candidates:
        current = "none"
    if transfer.bytes_per_s is None:
        return current
    best: CodecName = max(candidates, key=transfer.saved_s, default="none")
    if best == "none":
        return "none"
    if current != "none" and transfer.saved_s(current) < _LEAVE * transfer.step_s:
        current = "none"
    gained_s = transfer.saved_s(best) - transfer.saved_s(current)
    return best if gained_s >= _ENTER * transfer.step_s else current


def smallest(allowed: Collection[CodecName], transfer: Transfer) -> CodecName:
    """The codec that needs the fewest bytes, whatever the link."""
    return min(_shorter(allowed, transfer), key=transfer.nbytes, default="none")


def _shorter(allowed: Collection[CodecName], transfer: Transfer) -> list[CodecName]:
    return [codec for codec in allowed if transfer.nbytes(codec) < transfer.nbytes("none")]
