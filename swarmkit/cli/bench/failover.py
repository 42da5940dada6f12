"""`swarmkit bench failover`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from swarmkit.cli.app import Json
from swarmkit.cli.bench.common import BenchThreads, ModelOption, bench_app, make_table, measuring, report


@bench_app.command()
def failover(
    model: ModelOption = "tiny-chat",
    trials: Annotated[int, typer.Option("--trials", min=1, help="Servers to kill.")] = 5,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="Tokens per answer.")] = 64,
    threads: BenchThreads = 1,
    seed: Annotated[int, typer.Option("--seed", help="Decides which server dies after which token.")] = 0,
    json: Json = False,
) -> None:
    """The stall from SIGKILL to the next token.

    Examples:

        swarmkit bench failover --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.failover import bench_failover

        result = bench_failover(
            subject, trials=trials, tokens=tokens, threads=threads, seed=seed, on_progress=progress
        )
    report("failover", result, json, _table)


def _table(result: dict[str, Any]) -> Table:
    return make_table(
        f"{result['model']}: a server in use is killed with SIGKILL",
        ("trials", "answers equal", "median stall ms", "longest", "usual ms per token"),
        [
            (
                result["trials"],
                result["equal"],
                f"{result['stall_ms_median']:.0f}",
                f"{result['stall_ms_max']:.0f}",
                f"{result['usual_ms_per_token']:.2f}",
            )
        ],
    )
