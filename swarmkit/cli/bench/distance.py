"""`swarmkit bench distance`."""

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
def distance(
    model: ModelOption = "tiny-chat",
    round_trip_ms: Annotated[
        float, typer.Option("--round-trip-ms", min=0, help="Between any two peers.")
    ] = 100.0,
    megabits: Annotated[float, typer.Option("--megabits", min=0.001, help="Mbit/s of each link.")] = 100.0,
    stages: Stages = 3,
    tokens: Tokens = 32,
    rounds: Rounds = 3,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    prompt_lookup: Annotated[
        int,
        typer.Option(
            "--prompt-lookup",
            min=0,
            help="Also look up so many draft tokens at most, in text that repeats and in text that does not.",
        ),
    ] = 0,
    draft_blocks: Annotated[
        int, typer.Option("--draft-blocks", min=0, help="Also have so many of the first blocks draft.")
    ] = 0,
    json: Json = False,
) -> None:
    """Decode over long links, and the ratio to what their round trips allow.

    Examples:

        swarmkit bench distance --model M --round-trip-ms 100 --megabits 100 --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.distance import bench_distance

        result = bench_distance(
            subject,
            round_trip_s=round_trip_ms / 1e3,
            bandwidth=megabits * 1e6,
            stages=stages,
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            prompt_lookup=prompt_lookup,
            draft_blocks=draft_blocks,
            on_progress=progress,
        )
    report("distance", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    from swarmkit.bench.distance import SPECULATIVE

    bound = result["bound_tokens_per_s"]
    table = make_table(
        f"{result['stages']} servers, {result['round_trip_ms']:g} ms apart, "
        f"{result['bandwidth'] / 1e6:g} Mbit/s, {conditions(result)}",
        (
            "",
            "tokens/s",
            f"÷ chain bound {bound['chain']:.2f}",
            f"÷ relayed bound {bound['relayed']:.2f}",
            "÷ plain",
        ),
        [
            (
                name.replace("_", " "),
                f"{result[name]['tokens_per_s']:.2f}",
                f"{result[name]['ratio_to_chain_bound']:.2f}",
                f"{result[name]['ratio_to_relayed_bound']:.2f}",
                f"{result[name]['ratio_to_plain']:.2f}" if "ratio_to_plain" in result[name] else "",
            )
            for name in ("chain", "relayed", *SPECULATIVE)
            if result[name]
        ],
    )
    table.caption = f"without delay, a link adds {result['emulator_ms']:.2f} ms to a round trip"
    return table
