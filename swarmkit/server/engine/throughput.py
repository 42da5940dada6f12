"""Measuring the speed of a stage."""

from __future__ import annotations

import statistics

import torch

from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.work import BULK

_WARM_UP_STEPS = 3
_STEPS = 12


async def measure_decode_rate(stage: Stage, engine: Engine) -> float:
    """Measure decode steps of one row (tokens) per second through all blocks of the stage.

    The result is the median of a few single-token steps with a short cache, on the device and with the
    threads that will serve. Each step is a job of its own, between which steps of sessions on the same device
    run. The hidden states are seeded noise, as their values do not matter.
    """

    def begin() -> StepPart:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 1, stage.hidden_size, generator=generator).to(stage.device, stage.dtype)
        return StepPart(hidden, stage.new_cache(stage.start, stage.stop))

    part = (await engine.run(begin, BULK)).value

    def step() -> float:
        started = engine.now()
        (output,) = stage.forward_many([part])  # as the engine does
        if isinstance(output, Exception):
            raise output
        output.to("cpu")  # a copy to the host waits for the device
        return engine.now() - started

    seconds = [(await engine.run(step, BULK)).value for _ in range(_WARM_UP_STEPS + _STEPS)]
    return 1.0 / max(statistics.median(seconds[_WARM_UP_STEPS:]), 1e-9)
