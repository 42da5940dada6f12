"""`swarmkit bench footprint`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from swarmkit.cli.app import Json
from swarmkit.cli.bench.common import (
    BenchDType,
    BenchThreads,
    ModelOption,
    Rounds,
    bench_app,
    conditions,
    make_table,
    measuring,
    report,
)


@bench_app.command()
def footprint(
    model: ModelOption = "tiny-chat",
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Blocks that the server holds.")] = 8,
    rounds: Rounds = 3,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    json: Json = False,
) -> None:
    """One server's processes and memory, and how long it takes until it serves.

    Examples:

        swarmkit bench footprint --model M --blocks 8 --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.footprint import bench_footprint

        result = bench_footprint(
            subject, blocks=blocks, rounds=rounds, threads=threads, dtype=dtype, on_progress=progress
        )
    report("footprint", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    return make_table(
        f"{result['blocks']} blocks of {conditions(result)}",
        ("processes", "MB in all", "MB of weights", "MB beyond them", "seconds until it serves"),
        [
            (
                result["processes"],
                f"{result['memory_bytes'] / 1e6:.0f}",
                f"{result['weights_bytes'] / 1e6:.0f}",
                f"{result['memory_beyond_weights_bytes'] / 1e6:.0f}",
                f"{result['ready_s']:.1f}",
            )
        ],
    )
