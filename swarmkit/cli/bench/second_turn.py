"""`swarmkit bench second-turn`."""

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


@bench_app.command("second-turn")
def second_turn(
    model: ModelOption = "tiny-chat",
    stages: Annotated[int, typer.Option("--stages", min=1)] = 2,
    history_tokens: Annotated[
        int, typer.Option("--history-tokens", min=16, help="What was said in the first turn.")
    ] = 2048,
    question_tokens: Annotated[int, typer.Option("--question-tokens", min=1)] = 32,
    rounds: Rounds = 3,
    threads: BenchThreads = 1,
    dtype: BenchDType = "float32",
    json: Json = False,
) -> None:
    """The first token of a chat's second turn, with what servers keep of the first one and without.

    Examples:

        swarmkit bench second-turn --model M --history-tokens 2048 --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.second_turn import bench_second_turn

        result = bench_second_turn(
            subject,
            history_tokens=history_tokens,
            question_tokens=question_tokens,
            stages=stages,
            rounds=rounds,
            threads=threads,
            dtype=dtype,
            on_progress=progress,
        )
    report("second-turn", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    return make_table(
        f"a second turn after {result['history_tokens']} tokens, {conditions(result)}",
        ("seconds to the first token", "without kept pages", "times faster"),
        [
            (
                f"{result['first_token_s']:.3f}",
                f"{result['first_token_without_s']:.3f}",
                f"{result['times_faster']:.1f}",
            )
        ],
    )
