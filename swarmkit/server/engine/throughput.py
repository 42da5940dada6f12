"""Measuring the speed of a stage, under the engine that serves it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.work import BULK

_MOST_STEPS = 8
_WARM_UP_STEPS = 2
_STEPS_ALIKE = 3
_ALIKE = 1.05
"""So many steps in a row that differ by no more than this factor are enough."""
_PROMPT_TOKENS = 64
_PROMPTS = 2
"""Few passes of each: a server measures before it serves, and goes on to learn from clients' steps."""


async def measure_decode_rate(stage: Stage, engine: Engine) -> float:
    """Measure decode steps of one row (tokens) per second through all blocks of the stage.

    It takes single-token steps with a short cache, on the device and with the threads that will serve; see
    `typical_step_s`. Each step is a job of its own, between which steps of sessions on the same device run.
    The hidden states are seeded noise, as their values do not matter.
    """
    part = (await engine.run(lambda: _noise(stage, 1), BULK)).value
    seconds: list[float] = []
    while (typical_s := typical_step_s(seconds)) is None:
        seconds.append((await engine.run(lambda: _pass_s(stage, engine, part), BULK)).value)
    return 1.0 / max(typical_s, 1e-9)


def typical_step_s(seconds: Sequence[float]) -> float | None:
    """How long a step takes, by the steps so far; None while more of them are needed.

    Once several in a row take the same time, it is theirs. On a machine that is busy with other work they may
    never do; then it is the median of all steps but the first ones, which may make preparations.
    """
    latest = seconds[-_STEPS_ALIKE:]
    if len(latest) == _STEPS_ALIKE and max(latest) <= _ALIKE * min(latest):
        return statistics.median(latest)
    return statistics.median(seconds[_WARM_UP_STEPS:]) if len(seconds) >= _MOST_STEPS else None


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
