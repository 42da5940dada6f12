"""`swarmkit simulate`: a swarm of virtual servers in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from swarmkit.cli import console
from swarmkit.cli.app import Json, app


@app.command()
def simulate(
    model: Annotated[
        str, typer.Option("--model", help="bloom-176b, llama-2-70b or llama-2-7b.")
    ] = "llama-2-70b",
    servers: Annotated[int, typer.Option("--servers", min=1, help="Servers at the beginning.")] = 100,
    mix: Annotated[
        str, typer.Option("--mix", help="Kinds of hardware and their shares, as in a100=1,t4=3.")
    ] = "a100=1,rtx4090=2,rtx3090=3,rtx3060=2,t4=2",
    rule: Annotated[
        Literal["ours", "petals"], typer.Option("--rule", help="Who decides about placement and routes.")
    ] = "ours",
    hours: Annotated[float, typer.Option("--hours", min=0.0, help="Virtual hours.")] = 1.0,
    churn: Annotated[
        float, typer.Option("--churn", min=0.0, help="Share of the servers that goes each hour, and comes.")
    ] = 0.1,
    crash: Annotated[
        bool, typer.Option("--crash", help="Servers crash; else they say that they go.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Table (CSV) of seconds and running servers, instead of churn."),
    ] = None,
    rate: Annotated[float, typer.Option("--rate", min=1e-6, help="Requests per second.")] = 0.5,
    requests: Annotated[int, typer.Option("--requests", min=0, help="Number of requests.")] = 200,
    demand: Annotated[
        Path | None,
        typer.Option("--demand", help="Table (CSV) of times, prompt and answer tokens, instead of a rate."),
    ] = None,
    stretch: Annotated[
        float,
        typer.Option("--stretch", min=1e-6, help="Requests of the table come so many times as slowly."),
    ] = 1.0,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients that requests come from.")] = 8,
    topology: Annotated[
        Path | None,
        typer.Option("--topology", help="Network: a .graph file, or a table (CSV) of round trips."),
    ] = None,
    batching: Annotated[
        bool, typer.Option("--batching/--alone", help="Steps that wait run together, or each for itself.")
    ] = True,
    paged: Annotated[
        bool, typer.Option("--paged/--reserved", help="Caches grow with sessions, or are reserved for them.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write curves over time to this file, as SVG.")
    ] = None,
    json: Json = False,
) -> None:
    """Let a swarm of virtual servers live, and tell what its clients got.

    The package's own placement, routing, bans and admission decide; only computing and the network are
    replaced by durations. The same options and seed give the same result.

    Examples:

        swarmkit simulate --servers 1000 --hours 2 --requests 0

        swarmkit simulate --model llama-2-7b --mix t4 --trace churn.csv --demand requests.csv --json
    """
    console.setup(False)
    from swarmkit.simulation.options import SwarmAssumptions
    from swarmkit.simulation.plots import draw_curves
    from swarmkit.simulation.run import SimulationSetup, parse_mix, summary
    from swarmkit.simulation.run import simulate as run

    setup = SimulationSetup(
        model=model,
        servers=servers,
        mix=parse_mix(mix),
        rule=rule,
        hours=hours,
        churn_per_hour=churn,
        trace=trace,
        rate=rate,
        requests=requests,
        demand=demand,
        stretch=stretch,
        clients=clients,
        topology=topology,
        assumptions=SwarmAssumptions(batching=batching, paged=paged, notice_s=None if crash else 30.0),
        seed=seed,
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console.err, transient=True, disable=json) as progress:
        bars: dict[str, TaskID] = {}

        def on_progress(what: str, done: float, total: float) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        history = run(setup, on_progress)
    if plot is not None:
        curves = {
            "÷ bound": [(one.at_s / 3600, one.rate / max(one.bound, 1e-9)) for one in history.samples],
            "servers ÷ most": _shares([(one.at_s / 3600, float(one.servers)) for one in history.samples]),
        }
        plot.write_text(draw_curves("Tokens per second ÷ upper bound", "hours", "", curves))
    found = summary(setup, history)
    if json:
        console.emit_json(**found)
        return
    table = Table(title=f"{found['servers']:g} servers of {model}, {hours:g} hours", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in found.items():
        if isinstance(value, dict):
            value = f"{value['mean']:g} (median {value['median']:g}, 95th {value['p95']:g})"
        table.add_row(name.replace("_", " "), str(value))
    console.out.print(table)


def _shares(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    most = max((y for _, y in curve), default=1.0) or 1.0
    return [(x, y / most) for x, y in curve]
