"""`swarmkit bench soak`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from swarmkit.cli import console
from swarmkit.cli.app import Json
from swarmkit.cli.bench.common import BenchThreads, ModelOption, bench_app, make_table, measuring, report


@bench_app.command()
def soak(
    model: ModelOption = "tiny-chat",
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, max=24 * 60)] = 15.0,
    clients: Annotated[int, typer.Option("--clients", min=1, max=256, help="At the same time.")] = 16,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Over which they are spread.")] = 4,
    kill_every: Annotated[
        float, typer.Option("--kill-every", min=0.0, help="Seconds between two SIGKILLs; 0 = none.")
    ] = 10.0,
    threads: BenchThreads = 1,
    seed: Annotated[int, typer.Option("--seed", help="Decides who does what when.")] = 0,
    json: Json = False,
) -> None:
    """Clients that come, go, cancel and are killed; then a count of what the servers still hold.

    Exits with code 1 if anything is left, or an answer was not the local model's.

    Examples:

        swarmkit bench soak --minutes 15 --clients 16 --json
    """
    with measuring(model, threads) as (subject, progress):
        from swarmkit.bench.soak import bench_soak

        result = bench_soak(
            subject,
            minutes=minutes,
            clients=clients,
            processes=processes,
            kill_every_s=kill_every,
            threads=threads,
            seed=seed,
            on_progress=progress,
        )
    report("soak", result, json, _table)
    if not result["sound"]:
        for line in [*result["left"], *result["errors"]]:
            console.err.print(f"[red]{line}[/]")
        raise typer.Exit(1)


def _table(result: dict[str, Any]) -> Table:
    table = make_table(
        f"{result['clients']} clients on {result['servers']} servers for {result['minutes']:g} minutes",
        ("what happened", "times"),
        list(result["counts"].items()),
    )
    table.caption = "nothing is left" if not result["left"] else f"{len(result['left'])} things are left"
    return table
