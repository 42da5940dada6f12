"""`swarmkit bench codecs`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from swarmkit.cli.app import Json
from swarmkit.cli.bench.common import (
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
def codecs(
    model: ModelOption = "tiny-chat",
    questions: Annotated[int, typer.Option("--questions", min=1, help="Asked for the agreement.")] = 100,
    stages: Stages = 4,
    round_trip_ms: Annotated[
        float, typer.Option("--round-trip-ms", min=0, help="Between any two peers.")
    ] = 20.0,
    megabits: Annotated[float, typer.Option("--megabits", min=0.001, help="Mbit/s of each link.")] = 2.0,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Of what is timed.")] = 128,
    tokens: Tokens = 24,
    rounds: Rounds = 3,
    threads: BenchThreads = 1,
    json: Json = False,
) -> None:
    """What each codec of hidden states saves, and which tokens it changes.

    Examples:

        swarmkit bench codecs --questions 200 --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.codecs import bench_codecs

        result = bench_codecs(
            subject,
            questions=questions,
            stages=stages,
            round_trip_s=round_trip_ms / 1e3,
            bandwidth=megabits * 1e6,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            on_progress=progress,
        )
    report("codecs", result, json, _tables)


def _tables(result: dict[str, Any]) -> Group:
    agreement: Table = make_table(
        f"{result['stages']} servers, {result['questions']} questions, {conditions(result)}",
        ("codec", "bytes/token", "÷ none", "equal answers", "equal tokens", "max logit difference"),
        [
            (
                row["codec"],
                f"{row['bytes_per_token']:,}",
                f"{row['ratio_of_bytes']:.3f}",
                f"{row['equal_answers']:.1%}",
                f"{row['equal_tokens']:.1%}",
                f"{row['max_logit_difference']:.2g}",
            )
            for row in result["agreement"]
        ],
    )
    speed = make_table(
        f"links of {result['bandwidth'] / 1e6:g} Mbit/s and {result['round_trip_ms']:g} ms there and back",
        ("codec", "tokens/s", "÷ none", f"first of {result['prompt_tokens']} tokens, s", "÷ none"),
        [
            (
                row["codec"],
                f"{row['tokens_per_s']:.2f}",
                f"{row['ratio_to_none']:.2f}",
                f"{row['first_token_s']:.2f}",
                f"{row['first_token_ratio_to_none']:.2f}",
            )
            for row in result["speed"]
        ],
    )
    return Group(agreement, speed)
