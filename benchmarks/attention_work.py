"""What does a step of many rows over a long past cost, and what do the tokens of another client wait for it?

    python benchmarks/attention_work.py --json > benchmarks/results/attention-tiny-chat.json

One engine with all blocks of a model serves two clients. One of them has a session whose rows share a long
beginning, and sends a step of one token of each row. The other one decodes token by token meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from swarmkit.bench.environment import environment
from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage, StageCache, StepPart
from swarmkit.server.engine.engine import Engine

TOKENS_ALONE = 20


@dataclass(frozen=True)
class Result:
    """Times in milliseconds, memory in MiB."""

    model: str
    rows: int
    past: int
    step_ms: float
    """The step of many rows, by itself."""
    step_beside_ms: float
    """The same while the other client decodes."""
    peak_mib: float
    """By how much the process was larger than before the step."""
    token_ms: float
    """Median time of the other client's tokens, by itself."""
    token_beside_ms: float
    longest_token_beside_ms: float


class _Step:
    """New tokens of a session, as the engine takes them."""

    cached_output = None

    def __init__(self, stage: Stage, cache: StageCache, hidden: Tensor, client: str) -> None:
        self.stage, self.client, self.session = stage, client, id(cache)
        self.shape = hidden.shape[0], hidden.shape[1]
        self.past = cache.tokens
        self._part = StepPart(hidden, cache)

    def prepare(self) -> StepPart:
        return self._part

    def result(self, output: Tensor) -> Tensor:
        return output

    def after_result(self, output: Tensor) -> None:
        """Nothing is kept."""


def _noise(stage: Stage, rows: int, tokens: int) -> Tensor:
    return 0.1 * torch.randn(rows, tokens, stage.hidden_size)


async def _timed(engine: Engine, step: Any) -> float:
    began = SYSTEM_CLOCK.now()
    await engine.step(step)
    return (SYSTEM_CLOCK.now() - began) * 1e3


async def measure(model: str, rows: int, past: int) -> Result:
    checkpoint = Checkpoint.open(model)
    stage = Stage.load(checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32)
    engine = Engine("bench")
    heavy, light = (stage.new_cache(stage.start, stage.stop) for _ in range(2))
    await engine.step(_Step(stage, heavy, _noise(stage, 1, past), "heavy"))
    await engine.step(_Step(stage, light, _noise(stage, 1, 16), "light"))

    async def token() -> float:
        return await _timed(engine, _Step(stage, light, _noise(stage, 1, 1), "light"))

    async def many_rows() -> float:
        return await _timed(engine, _Step(stage, heavy, _noise(stage, rows, 1), "heavy"))

    alone = [await token() for _ in range(TOKENS_ALONE)]
    heavy.edit(past, [0] * rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step_ms = await many_rows()
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    step = asyncio.create_task(many_rows())
    await asyncio.sleep(0.05)
    beside = []
    while not step.done():
        beside.append(await token())
    step_beside_ms = await step
    await asyncio.to_thread(engine.close)
    return Result(
        model,
        rows,
        past,
        round(step_ms, 1),
        round(step_beside_ms, 1),
        round(peak_mib, 1),
        round(statistics.median(alone), 2),
        round(statistics.median(beside), 2),
        round(max(beside), 1),
    )


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--past", type=int, default=1900, help="tokens that all rows share")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = asdict(asyncio.run(measure(options.model, options.rows, options.past)))
    if options.json:
        told = environment() | {"command": "python benchmarks/attention_work.py " + " ".join(sys.argv[1:])}
        print(json.dumps(told | {"benchmark": "attention work", "rows": [result]}, indent=2))
        return
    for name, value in result.items():
        print(f"{name:26} {value}")


if __name__ == "__main__":
    main()
