"""`swarmkit bench train`."""

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
    bench_app,
    conditions,
    counts,
    make_table,
    measuring,
    report,
)


@bench_app.command()
def train(
    replicas: Annotated[str, typer.Option("--replicas", help="Servers of each stage, as in 1,2,4.")] = "1",
    model: ModelOption = "tiny-chat",
    stages: Stages = 2,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences in a batch.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each.")] = 128,
    rounds: Rounds = 5,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    json: Json = False,
) -> None:
    """A training step: forward and forward + backward, as ratios to the local model in the same run.

    Examples:

        swarmkit bench train --model M --batch 8 --tokens 128 --replicas 1,2,4 --json
    """
    numbers = counts(replicas, "--replicas")
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.train import bench_train

        result = bench_train(
            subject,
            numbers,
            stages=stages,
            batch=batch,
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            on_progress=progress,
        )
    report("train", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    table = make_table(
        f"{result['batch']} x {result['tokens']} tokens, {conditions(result)}",
        (
            "servers",
            "forward ÷ local",
            "forward + backward ÷ local",
            "without output layer",
            "forward s",
            "both s",
            "MB per step",
        ),
        [
            (
                f"{row['replicas']} x {result['stages']}",
                f"{row['forward_ratio_to_local']:.2f}",
                f"{row['both_ratio_to_local']:.2f}",
                f"{row['blocks_forward_ratio_to_local']:.2f}, {row['blocks_both_ratio_to_local']:.2f}",
                f"{row['forward_s']:.3f}",
                f"{row['both_s']:.3f}",
                f"{(row['bytes_sent_per_step'] + row['bytes_received_per_step']) / 1e6:.1f}",
            )
            for row in result["results"]
        ],
    )
    largest = max(row["largest_gradient_difference"] for row in result["results"])
    table.caption = f"gradients differ from the local model's by {largest:.1e} at most"
    return table
