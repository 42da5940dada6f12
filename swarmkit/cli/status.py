"""`swarmkit status`: who serves what."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from swarmkit.cli import console
from swarmkit.cli.app import Join, Json, Verbose, app
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.net.protocol.messages import ServerInfo
    from swarmkit.net.registry.records import Announcement


_ANSWER_S = 3.0
"""For a server to say what it is doing."""


@app.command()
def status(
    join: Join = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Only this model, by name or fingerprint.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the servers of a swarm, model by model, and which blocks nobody serves.

    Exits with code 2 if blocks of a shown model are missing, or nothing is served at all.

    Examples:

        swarmkit status --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo…

        swarmkit status --join … --json | jq '.models[].missing'
    """
    console.setup(verbose)
    if not join:
        raise UsageError("which swarm? give --join ADDRESS, as `swarmkit serve` and `bootstrap` print it")
    models = [
        entry for entry in _look_up(join) if model is None or model in (entry["model"], entry["fingerprint"])
    ]
    if json:
        console.emit_json(models=models)
    elif not models:
        console.out.print("Nobody serves a model here yet. Be the first: `swarmkit serve tiny-chat --join …`")
    else:
        for entry in models:
            _show(entry)
    if not models or any(entry["missing"] for entry in models):
        raise typer.Exit(2)


def _look_up(join: list[str]) -> list[dict]:  # type: ignore[type-arg]
    from swarmkit.net import portal
    from swarmkit.net.connect import over_hivemind
    from swarmkit.net.registry.acceptance import acceptable_now
    from swarmkit.net.registry.registry import Registry
    from swarmkit.net.rpc.server_info import ask_all
    from swarmkit.net.transport.identity import Identity

    with portal.lease() as lease:
        transport = lease.call(over_hivemind(join, client_mode=True), Identity(), acceptable_now)
        try:
            found = lease.call(Registry(transport).look_up_all)
            now = time.time()
            servers = found.servers(now, ("joining", "online", "leaving"))
            answering = [server for server in servers if server.state != "joining"]
            doing = lease.call(ask_all, transport, answering, _ANSWER_S)
        finally:
            lease.call(transport.close)
    by_model: dict[tuple[str, str, int], list[Announcement]] = {}
    for server in servers:
        by_model.setdefault((server.model, server.fingerprint, server.num_blocks), []).append(server)
    return [
        _describe(name, fingerprint, num_blocks, servers, doing, now)
        for (name, fingerprint, num_blocks), servers in sorted(by_model.items())
    ]


def _describe(
    name: str,
    fingerprint: str,
    num_blocks: int,
    servers: list[Announcement],
    doing: dict[str, ServerInfo],
    now: float,
) -> dict:  # type: ignore[type-arg]
    from swarmkit.net.registry.swarm_map import uncovered

    online = [(s.start, s.stop) for s in servers if s.state == "online"]
    return {
        "model": name,
        "fingerprint": fingerprint,
        "num_blocks": num_blocks,
        "missing": uncovered(0, num_blocks, online),
        "servers": [
            {
                "peer_id": s.peer_id,
                "name": s.public_name,
                "blocks": [s.start, s.stop],
                "state": s.state,
                "throughput": round(s.throughput, 1),
                "free_cache_tokens": s.free_cache_tokens,
                "dtype": s.dtype,
                "software": s.software,
                "addresses": list(s.addresses),
                "expires_in_s": round(s.expires_at - now, 1),
                **_load(doing.get(s.service_id)),
            }
            for s in sorted(servers, key=lambda s: (s.start, s.stop, s.peer_id))
        ],
    }


def _load(info: ServerInfo | None) -> dict[str, float | None]:
    """What a server has to do now; nothing is known of one that does not answer."""
    if info is None:
        return {"sessions": None, "queue": None, "expected_wait_s": None}
    return {
        "sessions": info.sessions,
        "queue": info.waiting,
        "expected_wait_s": round(info.expected_wait_ms / 1e3, 3),
    }


def _show(entry: dict) -> None:  # type: ignore[type-arg]
    total = entry["num_blocks"]
    table = Table(title=f"{entry['model']} · {total} blocks", title_justify="left", title_style="bold")
    numbers = ("tokens/s", "free cache", "sessions", "queue", "wait")
    for heading in ("server", "blocks", "", "state", *numbers, "computes in"):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    for server in entry["servers"]:
        low, high = server["blocks"]
        style = {"online": "green", "joining": "yellow", "leaving": "dim"}[server["state"]]
        table.add_row(
            server["name"] or f"…{server['peer_id'][-6:]}",
            f"{low}:{high}",
            _span(low, high, total, style),
            Text(server["state"], style),
            f"{server['throughput']:,.0f}",
            f"{server['free_cache_tokens']:,}",
            *("–" if server[key] is None else str(server[key]) for key in ("sessions", "queue")),
            "–" if server["expected_wait_s"] is None else f"{server['expected_wait_s']:.1f} s",
            server["dtype"],
        )
    console.out.print(table)
    if entry["missing"]:
        named = ", ".join(f"{low}:{high}" for low, high in entry["missing"])
        console.out.print(f"[red]nobody serves blocks {named}[/]: the model cannot run until somebody does")


def _span(low: int, high: int, total: int, style: str) -> Text:
    """A server's blocks as a bar of at most 32 cells."""
    cells = min(total, 32)
    first, last = low * cells // total, max(low * cells // total + 1, -(-high * cells // total))
    return Text("·" * first, "dim") + Text("█" * (last - first), style) + Text("·" * (cells - last), "dim")
