"""`swarmkit bench faults`."""

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
    Stages,
    Tokens,
    bench_app,
    conditions,
    make_table,
    measuring,
    report,
)


@bench_app.command()
def faults(
    model: ModelOption = "tiny-chat",
    probability: Annotated[
        float, typer.Option("--probability", min=0, max=1, help="That a send ends its connection.")
    ] = 1e-3,
    tokens: Tokens = 1024,
    stages: Stages = 2,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Servers of each stage.")] = 2,
    rounds: Rounds = 3,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    seed: Annotated[int, typer.Option("--seed", help="Decides which sends fail.")] = 0,
    json: Json = False,
) -> None:
    """Generate while connections break all the time, and the ratio to when none does.

    Examples:

        swarmkit bench faults --model S --probability 0.001 --tokens 1024 --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.faults import bench_faults

        result = bench_faults(
            subject,
            probability=probability,
            tokens=tokens,
            stages=stages,
            replicas=replicas,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            seed=seed,
            on_progress=progress,
        )
    report("faults", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    return make_table(
        f"each send fails with p = {result['probability']:g}, {conditions(result)}",
        ("tokens/s", "without faults", "ratio", "failed sends", "answers equal"),
        [
            (
                f"{result['tokens_per_s']:.1f}",
                f"{result['fault_free_tokens_per_s']:.1f}",
                f"{result['ratio_to_fault_free']:.2f}",
                f"{result['failed_sends']} of {result['sends']}",
                f"{result['equal']} of {result['rounds']}",
            )
        ],
    )
