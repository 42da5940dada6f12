"""`swarmkit bench clients`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from swarmkit.cli.app import Json
from swarmkit.cli.bench.common import (
    BenchThreads,
    ModelOption,
    Rounds,
    Stages,
    Tokens,
    bench_app,
    counts,
    make_table,
    measuring,
    report,
)


@bench_app.command()
def clients(
    clients: Annotated[str, typer.Option("--clients", help="How many at once, as in 1,8,32.")] = "1,8,32",
    model: ModelOption = "tiny-chat",
    stages: Stages = 2,
    tokens: Tokens = 32,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1)] = 16,
    rounds: Rounds = 3,
    load_processes: Annotated[
        int, typer.Option("--load-processes", min=1, help="Processes that the clients share.")
    ] = 2,
    threads: BenchThreads = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="One or more, as in float32,bfloat16.")] = (
        "float32,bfloat16"
    ),
    json: Json = False,
) -> None:
    """Tokens/s of many clients at once, and the ratio to one.

    Examples:

        swarmkit bench clients --model M --clients 1,8,32 --json
    """
    numbers = counts(clients, "--clients")
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.clients import bench_clients

        result = bench_clients(
            subject,
            numbers,
            stages=stages,
            dtypes=dtype.split(","),
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            threads=threads,
            load_processes=load_processes,
            on_progress=progress,
        )
    report("clients", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    table = make_table(
        f"{result['model']}, {result['stages']} servers, {result['threads']} thread(s) per process",
        ("dtype", "clients", "tokens/s", "ratio to one", "ms per token", "clients' share of the CPU"),
        [
            (
                part["dtype"],
                row["clients"],
                f"{row['tokens_per_s']:.1f}",
                f"{row['ratio_to_one']:.2f}",
                f"{row['ms_per_token']:.1f}",
                f"{row['client_cpu_share']:.2f}",
            )
            for part in result["results"]
            for row in part["clients"]
        ],
    )
    checks = (
        f"{part['generate']['equal']} of {part['generate']['clients']} in {part['dtype']}"
        for part in result["results"]
    )
    table.caption = "answers at the same time that are the local model's: " + ", ".join(checks)
    return table
