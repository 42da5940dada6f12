"""What virtual servers are made of: kinds of accelerators, models, and mixes of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarmkit.errors import UsageError
from swarmkit.placement.description import Machine, ModelSize


@dataclass(frozen=True)
class Hardware:
    """A kind of accelerator.

    Attributes:
        memory_gb: that blocks and caches may use.
        tflops: of dense products in 16 bits.
        gb_per_s: of its memory.
    """

    name: str
    memory_gb: float
    tflops: float
    gb_per_s: float


HARDWARE = {
    one.name: one
    for one in (
        Hardware("a100", 79.13, 312, 2039),
        Hardware("3g.40gb", 40.0, 156, 1020),
        Hardware("2g.20gb", 20.0, 78, 510),
        Hardware("1g.10gb", 8.2, 39, 255),
        Hardware("rtx4090", 22.5, 165, 1008),
        Hardware("rtx3090", 22.5, 71, 936),
        Hardware("rtx3060", 11.0, 25, 360),
        Hardware("l4", 22.0, 121, 300),
        Hardware("t4", 14.5, 65, 300),
        Hardware("m2-pro", 12.0, 7, 200),
    )
}
"""Data sheets; the slices of an A100 as in arXiv 2512.21884 and its simulator."""


@dataclass(frozen=True, kw_only=True)
class SimulatedModel:
    """A model as far as a simulation needs it.

    Attributes:
        block_gflop: of one token in one block, in 10^9 operations.
        hidden_bytes: of one token's hidden states on the wire.
    """

    name: str
    size: ModelSize
    block_gflop: float
    hidden_bytes: int


MODELS = {
    one.name: one
    for one in (
        SimulatedModel(
            name="bloom-176b",
            size=ModelSize(num_blocks=70, block_bytes=1.32e9, token_bytes=0.1186e9 / 2068),
            block_gflop=5.0,
            hidden_bytes=28_672,
        ),
        SimulatedModel(
            name="llama-2-70b",
            size=ModelSize(num_blocks=80, block_bytes=1.71e9, token_bytes=4096.0),
            block_gflop=1.71,
            hidden_bytes=16_384,
        ),
        SimulatedModel(
            name="llama-2-7b",
            size=ModelSize(num_blocks=32, block_bytes=0.4375e9, token_bytes=16_384.0),
            block_gflop=0.4,
            hidden_bytes=8192,
        ),
    )
}
"""BLOOM in NF4 with the figures of arXiv 2512.21884; the Llamas in 16 bits."""

_STEP_OVERHEAD_S = 30e-6
"""Of one block in one forward pass: launching its kernels."""


def machine_of(
    kind: Hardware, model: SimulatedModel, name: str = "", *, way_s: float = 0.0, speed: float = 1.0
) -> Machine:
    """A machine of a kind: single tokens wait for its memory, many for its arithmetic.

    Args: speed: how many times as fast as its data sheet says; most reach half or less.
    """
    return Machine(
        name=name,
        memory_bytes=kind.memory_gb * 1e9,
        decode_s=model.size.block_bytes / (kind.gb_per_s * 1e9 * speed) + _STEP_OVERHEAD_S,
        token_s=model.block_gflop / (kind.tflops * 1e3 * speed),
        way_s=way_s,
    )


def draw_kinds(mix: Mapping[str, float], count: int, chance: random.Random) -> Sequence[Hardware]:
    """So many kinds, drawn in the given proportions.

    Raises:
        UsageError: a kind is not known.
    """
    if unknown := set(mix) - set(HARDWARE):
        raise UsageError(
            f"no hardware is called {', '.join(sorted(unknown))}; there are {', '.join(HARDWARE)}"
        )
    return [HARDWARE[name] for name in chance.choices(list(mix), list(mix.values()), k=count)]
