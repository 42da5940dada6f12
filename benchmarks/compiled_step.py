"""How much faster is a decode step of a server that was compiled?

    python benchmarks/compiled_step.py --model M --json > benchmarks/results/compiled-step-m.json
    python benchmarks/compiled_step.py --model M --sessions 1 --with-products

One stage with all blocks of a model, in float32, in this process with one torch thread, and in huge pages
where Linux leaves that to programs, as a server has it. Its decode step is compiled as a server does it
(`swarmkit/server/engine/compiling.py`) and compared block by block with the step that it replaces. Then
sessions that hold so many tokens decode one token each, with compiled steps and without (`eager`), by turns;
the first turns do not count. Outputs are compared at every turn.

Reported for each number of sessions and of tokens that they hold: milliseconds of a step of both kinds, and
`ratio`, of eager to compiled, the median of the ratios within turns. `products_ms` is what the products of
one row with all weights take, without anything between them: what a step of one session could take at best
with these kernels. `compile_s` is what compiling took, at the lowest priority, and `load_s` loading.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from swarmkit.bench.environment import environment
from swarmkit.bench.subject import open_subject
from swarmkit.cli.console import quiet_transformers
from swarmkit.huge_pages import ask_for_huge_pages
from swarmkit.models.compiled.kinds import StageKinds, kinds_of
from swarmkit.models.compiled.shelf import PackageShelf
from swarmkit.models.compiled.steps import CompiledSteps, Program, StepComparison
from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.server.engine.compiling import MOST_ROWS_WITH_PRODUCTS, compile_apart, program_key

LENGTH = 2048
UNCOUNTED = 3


@dataclass(frozen=True)
class Row:
    """So many sessions that hold so many tokens each."""

    sessions: int
    held: int
    eager_ms: float
    compiled_ms: float
    ratio: float
    difference: float
    """Largest difference of the stage's outputs, in parts of the largest value."""


def timed_ms(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds that it takes, and what it returns."""
    began = time.perf_counter()
    found = work()
    return (time.perf_counter() - began) * 1e3, found


def programs_for(
    stage: Stage, kinds: StageKinds, rows: int, shelf: PackageShelf, with_products: bool
) -> tuple[dict[str, Program], float, float]:
    """The programs, and the seconds that compiling and loading them took.

    Args: with_products: whether products with weights are compiled, too; only for a row or two.
    """
    began, paths = time.perf_counter(), {}
    for digest, kind in kinds.kinds.items():
        key = program_key(digest, rows, LENGTH, with_products)
        paths[digest] = anyio.run(compile_apart, shelf, key, kind, rows, LENGTH, with_products)
    compiled = time.perf_counter()
    programs = {digest: Program(path) for digest, path in paths.items()}
    loaded = time.perf_counter()
    comparison = StepComparison(stage, kinds, rows, LENGTH)
    for index, digest in enumerate(kinds.of_block):
        difference = comparison.difference(index, programs[digest])
        assert difference < 2e-5, f"block {index} differs by {difference}"
    return programs, compiled - began, loaded - compiled


def measure(stage: Stage, steps: CompiledSteps, sessions: int, held: int, turns: int) -> Row:
    """Decode in both ways, by turns."""
    generator = torch.Generator().manual_seed(held)
    prompt = torch.randn(1, held, stage.hidden_size, generator=generator)
    caches = [
        [stage.new_cache(stage.start, stage.stop) for _ in range(sessions)] for _ in ("eager", "compiled")
    ]
    for cache in itertools.chain(*caches):
        for chunk in prompt.split(512, dim=1):
            stage.forward(chunk, cache)
    times: list[tuple[float, float]] = []
    difference = 0.0
    for _ in range(turns + UNCOUNTED):
        token = torch.randn(1, 1, stage.hidden_size, generator=generator)
        plain, quick = ([StepPart(token, cache) for cache in both] for both in caches)
        eager_ms, wanted = timed_ms(lambda: stage.forward_many(plain))  # noqa: B023
        with torch.inference_mode():
            compiled_ms, found = timed_ms(lambda: steps.step(quick))  # noqa: B023
        assert found is not None, "the step did not run compiled"
        one, other = torch.cat(wanted), torch.cat(found)
        difference = max(difference, float((one - other).abs().max() / one.abs().max()))
        times.append((eager_ms, compiled_ms))
    times = times[UNCOUNTED:]
    return Row(
        sessions,
        held,
        round(statistics.median(eager for eager, _ in times), 3),
        round(statistics.median(compiled for _, compiled in times), 3),
        round(statistics.median(eager / compiled for eager, compiled in times), 3),
        difference,
    )


@torch.inference_mode()
def products_ms(stage: Stage) -> float:
    """Milliseconds of the products of one row with all weights of linear layers."""
    layers = [layer for layer in stage.base.modules() if isinstance(layer, nn.Linear)]
    work = [(layer, torch.randn(1, 1, layer.in_features)) for layer in layers]
    return statistics.median(timed_ms(lambda: [layer(row) for layer, row in work])[0] for _ in range(15))


def main() -> int:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="S", help="S, M, or a folder with a model")
    parser.add_argument("--sessions", default="1,2,4", help="numbers of sessions that decode at once")
    parser.add_argument("--held", default="32,1024", help="tokens that each holds")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument(
        "--with-products", action="store_true", help="of a session or two, compile products, too"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet_transformers()
    ask_for_huge_pages()  # torch has allocated no tensor so far
    torch.set_num_threads(1)
    counts = [int(count) for count in options.sessions.split(",")]
    with open_subject(options.model) as subject, tempfile.TemporaryDirectory() as folder:
        checkpoint = subject.checkpoint
        stage = Stage.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32", will_compile=True)
        kinds, shelf = kinds_of(stage), PackageShelf(Path(folder) / "compiled")
        steps = CompiledSteps(stage, kinds, max(counts), LENGTH)
        compile_s, load_s = {}, {}
        for count in counts:
            found = programs_for(
                stage, kinds, count, shelf, options.with_products and count <= MOST_ROWS_WITH_PRODUCTS
            )
            programs, compile_s[count], load_s[count] = found
            steps.put(count, programs)
        held = [int(tokens) for tokens in options.held.split(",")]
        rows = [measure(stage, steps, count, tokens, options.turns) for tokens in held for count in counts]
        result = {
            "benchmark": "compiled_step",
            **environment(),
            "command": " ".join(["python", "benchmarks/compiled_step.py", *sys.argv[1:]]),
            "load_average": round(os.getloadavg()[0], 2),
            "model": options.model,
            "kinds": len(kinds.kinds),
            "linear_layers": sorted({form for kind in kinds.kinds.values() for _, form, _ in kind.linear}),
            "compile_s": {count: round(seconds, 1) for count, seconds in compile_s.items()},
            "load_s": {count: round(seconds, 3) for count, seconds in load_s.items()},
            "weights_mib": round(sum(weight.numel() * 4 for weight in stage.base.parameters()) / 2**20, 1),
            "products_ms": round(products_ms(stage), 3),
            "rows": [asdict(row) for row in rows],
        }
    if options.json:
        print(json.dumps(result))
        return 0
    table = Table("sessions", "held", "eager ms", "compiled ms", "ratio", "difference")
    for row in rows:
        table.add_row(
            *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in asdict(row).values())
        )
    console = Console()
    console.print(table)
    console.print(f"products alone take {result['products_ms']} ms; compiling took {result['compile_s']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
