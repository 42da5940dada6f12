"""`swarmkit bench prefill`."""

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
    counts,
    make_table,
    measuring,
    report,
)


@bench_app.command()
def prefill(
    stages: Annotated[str, typer.Option("--stages", help="Lengths of the chain, as in 2,4.")] = "2,4",
    model: ModelOption = "tiny-chat",
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1)] = 1024,
    rounds: Rounds = 3,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    json: Json = False,
) -> None:
    """The wait for the first token of a long prompt, and the ratio to the local model.

    Examples:

        swarmkit bench prefill --model M --prompt-tokens 1024 --json
    """
    numbers = counts(stages, "--stages")
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.prefill import bench_prefill

        result = bench_prefill(
            subject,
            numbers,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            on_progress=progress,
        )
    report("prefill", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    return make_table(
        f"a prompt of {result['prompt_tokens']} tokens, {conditions(result)}",
        ("stages", "seconds to the first token", "local", "ratio"),
        [
            (
                row["stages"],
                f"{row['first_token_s']:.3f}",
                f"{row['local_first_token_s']:.3f}",
                f"{row['ratio_to_local']:.2f}",
            )
            for row in result["results"]
        ],
    )
