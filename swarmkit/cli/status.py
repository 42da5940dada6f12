"""`swarmkit status`: the servers of a swarm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from swarmkit.cli import console
from swarmkit.cli.app import IdentityFile, Join, Json, SwarmKeyFile, Verbose, app
from swarmkit.cli.interrupt import interruptible
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.client.status import ModelStatus

_WORDS = ("server", "blocks", "state", "computes in", "version")
_LESS = ("sessions", "queue", "wait", "computes in")
"""Columns that are left out where a terminal has fewer than `_WIDE` columns of characters."""
_WIDE = 130


@app.command()
def status(
    join: Join = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Only this model, by name or fingerprint.")
    ] = None,
    identity: IdentityFile = None,
    swarm_key: SwarmKeyFile = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again every few seconds, until Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between two looks.")] = 2.0,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the servers of a swarm, model by model, and the blocks that no server offers.

    Exits with code 2 if blocks of a shown model are missing, or nothing is served at all.

    Examples:

        swarmkit status --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo…

        swarmkit status --join … --watch

        swarmkit status --join … --json | jq '.models[].missing'
    """
    console.setup(verbose)
    if not join:
        raise UsageError("which swarm? give --join ADDRESS, as `swarmkit serve` and `bootstrap` print it")
    from swarmkit.client.status import swarm_status, watch_swarm

    def wanted(found: list[ModelStatus]) -> list[ModelStatus]:
        return [each for each in found if model is None or model in (each.model, each.fingerprint)]

    if watch:
        with (
            interruptible(),
            closing(watch_swarm(join, every, swarm_key=swarm_key, identity_path=identity)) as looks,
        ):
            _watch((wanted(found) for found in looks), json)
        return
    models = wanted(swarm_status(join, swarm_key=swarm_key, identity_path=identity))
    if json:
        console.emit_json(models=[each.to_json() for each in models])
    else:
        console.out.print(_page(models))
    if not models or any(each.missing for each in models):
        raise typer.Exit(2)


def _watch(looks: Iterator[list[ModelStatus]], json: bool) -> None:
    """Show each look in the place of the one before, or as a line of its own, until Ctrl-C."""
    try:
        if json:
            for models in looks:
                console.emit_json(event="looked", models=[each.to_json() for each in models])
            return
        with Live(Text("looking …", "dim"), console=console.out, auto_refresh=False) as live:
            for models in looks:
                live.update(Group(_page(models), Text("Press Ctrl-C to end.", "dim")), refresh=True)
    except KeyboardInterrupt:
        return


def _page(models: list[ModelStatus]) -> RenderableType:
    if not models:
        return "No server offers a model here yet. Start one: `swarmkit serve tiny-chat --join …`"
    return Group(*(part for each in models for part in _parts(each)))


def _parts(model: ModelStatus) -> Iterator[RenderableType]:
    from swarmkit.client.overview import shown_name, status_rows

    total = model.num_blocks
    table = Table(title=f"{model.model} · {total} blocks", title_justify="left", title_style="bold")
    (*headings, _), *rows = status_rows(model)  # what would break is told below the table
    shown = [heading for heading in headings if console.out.width >= _WIDE or heading not in _LESS]
    for heading in shown:
        table.add_column(heading, justify="left" if heading in _WORDS else "right")
        if heading == "blocks":
            table.add_column("")
    for server, row in zip(model.servers, rows, strict=True):
        low, high = server.blocks
        style = {"online": "green", "joining": "yellow", "leaving": "dim"}[server.state]
        cells: list[RenderableType] = []
        for heading, cell in zip(headings, row, strict=False):
            if heading in shown:
                cells.append(Text(cell, style if heading == "state" else ""))
            if heading == "blocks":
                cells.append(_span(low, high, total, style))
        table.add_row(*cells)
    yield table
    if model.missing:
        named = ", ".join(f"{low}:{high}" for low, high in model.missing)
        text = f"[red]no server offers blocks {named}[/]; the model cannot run until one does"
        yield Text.from_markup(text)
        return
    needed = [
        server for server in model.servers if server.state == "online" and model.missing_without(server)
    ]
    if needed:
        names = ", ".join(f"{shown_name(each)} {each.blocks[0]}:{each.blocks[1]}" for each in needed)
        yield Text(f"the model would stop if one of these left: {names}", "yellow")


def _span(low: int, high: int, total: int, style: str) -> Text:
    """A server's blocks as a bar of at most 32 cells."""
    cells = min(total, 32)
    first, last = low * cells // total, max(low * cells // total + 1, -(-high * cells // total))
    return Text("·" * first, "dim") + Text("█" * (last - first), style) + Text("·" * (cells - last), "dim")
