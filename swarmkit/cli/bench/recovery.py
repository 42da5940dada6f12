"""`swarmkit bench recovery`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from swarmkit.cli.app import Json
from swarmkit.cli.bench.common import (
    BenchDType,
    BenchThreads,
    ModelOption,
    Rounds,
    Stages,
    Tokens,
    bench_app,
    conditions,
    make_table,
    measuring,
    report,
)


@bench_app.command()
def recovery(
    model: ModelOption = "tiny-chat",
    tokens: Tokens = 256,
    stages: Stages = 2,
    rounds: Rounds = 5,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    json: Json = False,
) -> None:
    """Generate with all that survival needs kept ready, and the ratio to nothing kept.

    Examples:

        swarmkit bench recovery --model S --tokens 256 --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.recovery import bench_recovery

        result = bench_recovery(
            subject,
            tokens=tokens,
            stages=stages,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            on_progress=progress,
        )
    report("recovery", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    return make_table(
        conditions(result),
        ("tokens/s", "without recovery", "ratio"),
        [
            (
                f"{result['tokens_per_s']:.1f}",
                f"{result['tokens_per_s_without']:.1f}",
                f"{result['ratio_to_without']:.2f}",
            )
        ],
    )
