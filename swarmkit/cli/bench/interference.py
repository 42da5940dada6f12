"""`swarmkit bench interference`."""

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
def interference(
    model: ModelOption = "tiny-chat",
    prefill_tokens: Annotated[
        int, typer.Option("--prefill-tokens", min=1, help="Of the prompt that disturbs.")
    ] = 4096,
    stages: Stages = 2,
    tokens: Tokens = 128,
    rounds: Rounds = 3,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    json: Json = False,
) -> None:
    """How long one client's tokens take while another one's long prompt is computed.

    Examples:

        swarmkit bench interference --model M --prefill-tokens 4096 --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.interference import bench_interference

        result = bench_interference(
            subject,
            prefill_tokens=prefill_tokens,
            stages=stages,
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            on_progress=progress,
        )
    report("interference", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    table = make_table(
        f"decode beside a prompt of {result['prefill_tokens']} tokens, {conditions(result)}",
        ("", "steps", "median ms", "99th percentile", "longest"),
        [
            (
                name,
                result[name]["steps"],
                f"{result[name]['p50_ms']:.1f}",
                f"{result[name]['p99_ms']:.1f}",
                f"{result[name]['max_ms']:.1f}",
            )
            for name in ("alone", "beside")
        ],
    )
    table.caption = f"the 99th percentile grows {result['ratio_p99']:.2f} times"
    return table
