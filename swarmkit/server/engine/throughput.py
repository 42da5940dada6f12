"""Measuring the speed of a stage."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from swarmkit.models.execution.stage import Stage, StepPart

_WARM_UP_STEPS = 3
_STEPS = 12


def measure_decode_rate(stage: Stage, now: Callable[[], float]) -> float:
    """Measure decode steps of one row (tokens) per second through all blocks of the stage.

    The result is the median of a few single-token steps with a short cache, on the device and with the
    threads that will serve. Call it in a job of the engine. The hidden states are seeded noise, as their
    values do not matter.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, stage.hidden_size, generator=generator).to(stage.device, stage.dtype)
    cache = stage.new_cache(stage.start, stage.stop)
    seconds: list[float] = []
    for _ in range(_WARM_UP_STEPS + _STEPS):
        started = now()
        (output,) = stage.forward_many([StepPart(hidden, cache)])  # as the engine does
        if isinstance(output, Exception):
            raise output
        output.to("cpu")  # a copy to the host waits for the device
        seconds.append(now() - started)
    return 1.0 / max(statistics.median(seconds[_WARM_UP_STEPS:]), 1e-9)
