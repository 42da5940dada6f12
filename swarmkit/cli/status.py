"""`swarmkit status`: the servers of a swarm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from swarmkit.cli import console
from swarmkit.cli.app import Join, Json, SwarmKeyFile, Verbose, app
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.client.status import ModelStatus


@app.command()
def status(
    join: Join = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Only this model, by name or fingerprint.")
    ] = None,
    swarm_key: SwarmKeyFile = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the servers of a swarm, model by model, and the blocks that no server offers.

    Exits with code 2 if blocks of a shown model are missing, or nothing is served at all.

    Examples:

        swarmkit status --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo…

        swarmkit status --join … --json | jq '.models[].missing'
    """
    console.setup(verbose)
    if not join:
        raise UsageError("which swarm? give --join ADDRESS, as `swarmkit serve` and `bootstrap` print it")
    from swarmkit.client.status import swarm_status

    found = swarm_status(join, swarm_key=swarm_key)
    models = [each for each in found if model is None or model in (each.model, each.fingerprint)]
    if json:
        console.emit_json(models=[each.to_json() for each in models])
    elif not models:
        console.out.print("No server offers a model here yet. Start one: `swarmkit serve tiny-chat --join …`")
    else:
        for each in models:
            _show(each)
    if not models or any(each.missing for each in models):
        raise typer.Exit(2)


def _show(model: ModelStatus) -> None:
    total = model.num_blocks
    table = Table(title=f"{model.model} · {total} blocks", title_justify="left", title_style="bold")
    numbers = ("tokens/s", "free cache", "sessions", "queue", "wait")
    for heading in ("server", "blocks", "", "state", *numbers, "computes in"):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    for server in model.servers:
        low, high = server.blocks
        style = {"online": "green", "joining": "yellow", "leaving": "dim"}[server.state]
        table.add_row(
            server.name or f"…{server.peer_id[-6:]}",
            f"{low}:{high}",
            _span(low, high, total, style),
            Text(server.state, style),
            f"{server.throughput:,.0f}",
            f"{server.free_cache_tokens:,}",
            *("–" if count is None else str(count) for count in (server.sessions, server.queue)),
            "–" if server.expected_wait_s is None else f"{server.expected_wait_s:.1f} s",
            server.dtype,
        )
    console.out.print(table)
    if model.missing:
        named = ", ".join(f"{low}:{high}" for low, high in model.missing)
        console.out.print(f"[red]no server offers blocks {named}[/]; the model cannot run until one does")


def _span(low: int, high: int, total: int, style: str) -> Text:
    """A server's blocks as a bar of at most 32 cells."""
    cells = min(total, 32)
    first, last = low * cells // total, max(low * cells // total + 1, -(-high * cells // total))
    return Text("·" * first, "dim") + Text("█" * (last - first), style) + Text("·" * (cells - last), "dim")
