"""Exchanging a model's linear layers for others with the same products, where these are sooner done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import nn

SMALLEST = 2**18
"""Weights with fewer values stay as they are: their products take no time to speak of."""


def exchange_linear(model: nn.Module, other: Callable[[nn.Linear], nn.Linear | None]) -> int:
    """Put `other(layer)` in the place of each plain linear layer, unless it is None; returns how many."""
    exchanged = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and (new := other(child)) is not None:
                setattr(module, name, new)
                exchanged += 1
    return exchanged


def may_be_exchanged(layer: nn.Linear) -> bool:
    """Whether it is large and frozen, and on a CPU."""
    weight = layer.weight
    return weight.device.type == "cpu" and not weight.requires_grad and weight.numel() >= SMALLEST


def median_seconds(work: Callable[[], object], trials: int) -> float:
    """How long some work takes."""
    times = []
    for _ in range(trials):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
