"""Measuring the speed of a stage, under the engine that serves it."""

from __future__ import annotations

import statistics

import torch

from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.work import BULK

_WARM_UP_STEPS = 2
_STEPS = 6
_PROMPT_TOKENS = 64
_PROMPTS = 2
"""Few passes of each: a server measures before it serves, and goes on to learn from clients' steps."""


async def measure_decode_rate(stage: Stage, engine: Engine) -> float:
    """Measure decode steps of one row (tokens) per second through all blocks of the stage.

    The result is the median of a few single-token steps with a short cache, on the device and with the
    threads that will serve. Each step is a job of its own, between which steps of sessions on the same device
    run. The hidden states are seeded noise, as their values do not matter.
    """

    part = (await engine.run(lambda: _noise(stage, 1), BULK)).value
    seconds = [
        (await engine.run(lambda: _pass_s(stage, engine, part), BULK)).value
        for _ in range(_WARM_UP_STEPS + _STEPS)
    ]
    return 1.0 / max(statistics.median(seconds[_WARM_UP_STEPS:]), 1e-9)


async def measure_forward_rate(stage: Stage, engine: Engine) -> float:
    """Measure tokens per second of prompts through all blocks of the stage, with an empty cache before each.

    The best of a few passes counts: whatever disturbs one makes the stage look slow.
    """
    tokens = min(_PROMPT_TOKENS, engine.limits.chunk_tokens)

    def prompt() -> float:
        return _pass_s(stage, engine, _noise(stage, tokens))

    seconds = [(await engine.run(prompt, BULK)).value for _ in range(_PROMPTS)]
    return tokens / max(min(seconds), 1e-9)


def _noise(stage: Stage, tokens: int) -> StepPart:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, stage.hidden_size, generator=generator).to(stage.device, stage.dtype)
    return StepPart(hidden, stage.new_cache(stage.start, stage.stop))


def _pass_s(stage: Stage, engine: Engine, part: StepPart) -> float:
    started = engine.now()
    (output,) = stage.forward_many([part])  # as the engine does
    if isinstance(output, Exception):
        raise output
    output.to("cpu")  # a copy to the host waits for the device
    return engine.now() - started
