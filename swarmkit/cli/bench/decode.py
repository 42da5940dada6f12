"""`swarmkit bench decode`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from swarmkit.cli.app import Device, Json
from swarmkit.cli.bench.common import (
    BenchDType,
    BenchThreads,
    ModelOption,
    Rounds,
    Tokens,
    bench_app,
    conditions,
    counts,
    make_table,
    measuring,
    report,
)


@bench_app.command()
def decode(
    stages: Annotated[str, typer.Option("--stages", help="Lengths of the chain, as in 1,2,4.")] = "1,2,4",
    model: ModelOption = "tiny-chat",
    random_llama: Annotated[
        bool, typer.Option("--random-llama", help="Short for --model M: hidden 1024, 16 blocks.")
    ] = False,
    tokens: Tokens = 64,
    rounds: Rounds = 5,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    device: Device = "cpu",
    records: Annotated[
        bool, typer.Option(help="On an accelerator, start a token's work as one recorded piece.")
    ] = True,
    json: Json = False,
) -> None:
    """Tokens/s, the ratio to the local model in the same run, and what each hop adds.

    Examples:

        swarmkit bench decode --stages 1,2,4 --json

        swarmkit bench decode --model M --tokens 32

        swarmkit bench decode --model L --stages 1,2 --dtype bfloat16 --device cuda
    """
    numbers = counts(stages, "--stages")
    with measuring("M" if random_llama else model, threads, device) as (subject, progress):
        from swarmkit.bench.decode import bench_decode

        result = bench_decode(
            subject,
            numbers,
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            device=device,
            records=records,
            on_progress=progress,
        )
    report("decode", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    table = make_table(
        conditions(result),
        ("stages", "tokens/s", "local", "ratio", "ms added per hop", "of it network"),
        [
            (
                row["stages"],
                f"{row['tokens_per_s']:.1f}",
                f"{row['local_tokens_per_s']:.1f}",
                f"{row['ratio_to_local']:.2f}",
                f"{row['added_ms_per_hop']:.2f}",
                f"{row['network_ms_per_hop']:.2f}",
            )
            for row in result["results"]
        ],
    )
    if fit := result["fit"]:
        table.caption = (
            f"beyond local, a token takes {fit['base_ms']:.2f} ms + {fit['per_server_ms']:.2f} ms per server"
        )
    return table
