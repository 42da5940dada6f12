"""Do two servers agree on the outputs for the same inputs? Pure: tensors in, a number out.

Honest servers differ by rounding: each keeps weights and computes in a precision of its own, and on other
hardware sums are taken in another order. What a token may differ by has a part that follows the output (every
block rounds the hidden states that pass through it), and a part that follows what the blocks added to the
input (a weight that is off by a percent makes an update that is off by as much). The figures leave two to
three times the differences that `docs/security.md` reports for `tiny-chat`.

What differs by less is not seen: a lie inside the bound is a model of a slightly lower precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swarmkit.client.routing.route import Hop


@dataclass(frozen=True)
class Rounding:
    """What is lost, relative to the norm of a token's output (by one block), and of the blocks' update."""

    of_output: float
    of_update: float


_ROUNDING = {
    "float32": Rounding(1e-4, 1e-3),
    "float16": Rounding(2e-3, 5e-3),
    "bfloat16": Rounding(1.2e-2, 3e-2),
    "int8": Rounding(1.2e-2, 6e-2),
    "nf4": Rounding(1.2e-2, 0.25),
}
_STORED = Rounding(1.2e-2, 0.1)
"""Of checkpoints that are stored quantised: the same weights, but kernels that differ in how they round."""

_CODED = {"none": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 4e-2}
"""Relative to the norm of a token's output."""


def rounding_of(precision: str) -> Rounding:
    """What servers of a precision may lose, by the name that they announce."""
    return _ROUNDING.get(precision, _STORED)


def excess(
    output: Tensor,
    other: Tensor,
    inputs: Tensor,
    *,
    blocks: int,
    precisions: tuple[str, str],
    codec: str = "none",
    mask: Tensor | None = None,
) -> float:
    """How far two outputs are apart, as a multiple of what rounding explains; at most 1 if they agree.

    Args:
        output, other: `[batch, tokens, hidden]`.
        inputs: the hidden states that both were computed from, of the same shape.
        blocks: through how many blocks.
        precisions: of the two servers, as they announce them.
        codec: in which one of the outputs has travelled.
        mask: `[batch, tokens]`, 1 = compare; None = all.
    """
    mine, theirs = output.double(), other.double()
    size = torch.maximum(mine.norm(dim=-1), theirs.norm(dim=-1))
    update = torch.maximum((mine - inputs).norm(dim=-1), (theirs - inputs).norm(dim=-1))
    lost = [rounding_of(precision) for precision in precisions]
    passed = math.sqrt(blocks)
    of_output = passed * sum(each.of_output for each in lost) + _CODED[codec]
    allowed = of_output * size + sum(each.of_update for each in lost) * update
    apart = (mine - theirs).norm(dim=-1) / allowed.clamp_min(torch.finfo(torch.float32).tiny)
    if mask is not None:
        apart = apart[mask.bool()]
    return float(apart.max()) if apart.numel() else 0.0


@dataclass(frozen=True, eq=False)
class Comparison:
    """The outputs `[batch, tokens, hidden]` of two servers for the same inputs of the blocks of `first`."""

    first: Hop
    second: Hop
    outputs: tuple[Tensor, Tensor] = field(repr=False)
    inputs: Tensor = field(repr=False)

    def excess(self, codec: str = "none", mask: Tensor | None = None) -> float:
        """See `excess`."""
        return excess(
            *self.outputs,
            self.inputs,
            blocks=self.first.stop - self.first.start,
            precisions=(self.first.server.dtype, self.second.server.dtype),
            codec=codec,
            mask=mask,
        )
