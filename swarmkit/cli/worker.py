"""`swarmkit worker`: lend this computer in the background, within limits. Works without a desktop."""

from __future__ import annotations

import json as json_module
import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Json, Verbose, app
from swarmkit.errors import UsageError
from swarmkit.sizes import format_bytes, format_data, parse_bytes

if TYPE_CHECKING:
    from swarmkit.worker.control.client import WorkerClient
    from swarmkit.worker.control.values import Status, Totals

worker_app = typer.Typer(
    name="worker",
    help="Lend this computer to a swarm in the background, within limits that you set.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(worker_app)


@worker_app.command()
def run(
    loopback: Annotated[
        bool,
        typer.Option("--loopback", help="Listen on 127.0.0.1 also where there are Unix sockets."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run the worker until it is told to stop. It serves nothing until you have agreed.

    Examples:

        swarmkit worker run

        swarmkit worker set serve.model=tiny-chat rules.presence=headless agreed=true  # in another terminal
    """
    from swarmkit.worker.main import run_worker

    run_worker(loopback=loopback, verbose=verbose)


@worker_app.command()
def status(json: Json = False) -> None:
    """Say what the worker does, and why."""
    _show(_client().status(), json)


@worker_app.command()
def pause(
    until: Annotated[
        str,
        typer.Option(
            "--until",
            help="resumed, tomorrow (6 o'clock), away (nobody used the computer for 30 minutes), or a time "
            "span such as 15m or 1h.",
        ),
    ] = "resumed",
    now: Annotated[bool, typer.Option("--now", help="End at once; sessions go on at other servers.")] = False,
    polite: Annotated[
        bool, typer.Option("--polite", help="Give sessions their time to move away first.")
    ] = False,
    json: Json = False,
) -> None:
    """Stop serving: no more work within a second, and all memory back within three.

    Examples:

        swarmkit worker pause --until 1h

        swarmkit worker pause --until tomorrow

        swarmkit worker pause --now
    """
    if now and polite:
        raise UsageError("--now and --polite exclude each other")
    kind, seconds = _until(until)
    haste: Any = "now" if now else "polite" if polite else "prompt"
    _show(_client().pause(kind, seconds, haste), json)


@worker_app.command()
def resume(json: Json = False) -> None:
    """End your own pause. The worker serves where your rules allow."""
    _show(_client().resume(), json)


@worker_app.command()
def stop() -> None:
    """End the worker, after its sessions have moved away."""
    _client().stop()


@worker_app.command("set")
def set_(
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]…", help="Without any, the settings are shown. Sizes may have units: 20GB."
        ),
    ] = None,
) -> None:
    """Change settings; they are kept, and hold at once. Works also while no worker runs.

    Examples:

        swarmkit worker set

        swarmkit worker set limits.cpu_cores.in_use=1 limits.upload_bytes_per_s.away=2MB

        swarmkit worker set rules.on_battery=true 'rules.programs=["blender"]'
    """
    from msgspec.json import encode, format

    from swarmkit.worker.control.handle import NoWorkerError
    from swarmkit.worker.offline import change_offline, settings_offline

    client, wanted = _client(), _merge_patch(changes or [])
    try:
        settings = client.change_settings(wanted) if wanted else client.settings()
    except NoWorkerError:
        settings = change_offline(wanted) if wanted else settings_offline()
    typer.echo(format(encode(settings), indent=2).decode())


@worker_app.command()
def stats(
    days: Annotated[int, typer.Option("--days", min=1, help="Show so many days.")] = 7, json: Json = False
) -> None:
    """Say what this computer has contributed."""
    import msgspec
    from rich.table import Table

    client = _client()
    found, history = client.stats(), client.history(days)
    if json:
        console.emit_json(**msgspec.to_builtins(found), days=msgspec.to_builtins(history))
        return
    table = Table("", "tokens", "sessions", "served", "worked", "sent", "received")
    rows = [(day.date, day.totals) for day in history]
    for name, totals in (*rows, ("this month", found.month), ("in all", found.all)):
        table.add_row(name, *_columns(totals))
    console.out.print(table)


@worker_app.command()
def log(lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=5000)] = 50) -> None:
    """Show the end of the worker's log."""
    for line in _client().log(lines):
        typer.echo(line)


@worker_app.command(hidden=True)
def handle() -> None:
    """Print how a program of yours reaches the worker, with its token. The tray on Windows asks in WSL2."""
    import msgspec

    from swarmkit.worker.control.handle import Handle
    from swarmkit.worker.places import WorkerPlaces

    typer.echo(msgspec.json.encode(Handle.read(WorkerPlaces.of_this_person().handle)))


@worker_app.command()
def belongings(json: Json = False) -> None:
    """Show what the worker has put on this computer, and how much it takes. Works also while none runs."""
    import msgspec

    from swarmkit.worker.belongings import belongings as found_here

    found = found_here()
    if json:
        console.emit_json(**msgspec.to_builtins(found))
        return
    for part in found.parts:
        console.out.print(f"{format_data(part.size_bytes):>10}  {part.what}: {part.path}", soft_wrap=True)
    console.out.print(f"{format_data(found.size_bytes):>10}  in all")


def _client() -> WorkerClient:
    from swarmkit.worker.control.client import WorkerClient

    return WorkerClient()


def _until(text: str) -> tuple[Any, float | None]:
    if text in ("resumed", "tomorrow", "away"):
        return text, None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", text)
    if not found:
        raise UsageError(f"--until takes resumed, tomorrow, away, or a time span such as 15m; got {text!r}")
    unit = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[found[2]]
    return "seconds", float(found[1]) * unit


def _merge_patch(changes: list[str]) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}."""
    patch: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name:
            raise UsageError(f"{change!r} is no NAME=VALUE; `swarmkit worker set` shows all names")
        *groups, last = name.split(".")
        place = patch
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = _value(text)
    return patch


def _value(text: str) -> Any:
    if re.fullmatch(r"\d+(?:\.\d+)?\s*[KMGT]i?B", text):
        return parse_bytes(text)
    try:
        return json_module.loads(text)
    except ValueError:
        return text


def _show(status: Status, json: bool) -> None:
    if json:
        import msgspec

        console.emit_json(**msgspec.to_builtins(status))
        return
    ends = f" (until {datetime.fromtimestamp(status.until):%a %H:%M})" if status.until else ""
    console.out.print(f"[bold]{status.words}[/]{ends}")
    node = status.node
    if node is not None and node.blocks is not None:
        low, high = node.blocks
        console.out.print(
            f"  {status.model}, blocks {low}:{high}; {node.sessions} sessions, {node.tokens_per_s:.1f} "
            f"tokens/s, {node.cpu_cores:.1f} cores, {format_bytes(node.ram_bytes)} of memory"
        )
    console.out.print(
        f"  today {status.today.tokens} tokens for {status.today.sessions} sessions; "
        f"this month {format_data(status.month_bytes)} sent and received"
    )
    for trouble in status.troubles:
        console.out.print(f"  [yellow]{trouble}[/]", soft_wrap=True)


def _columns(totals: Totals) -> list[str]:
    return [
        f"{totals.tokens:,}",
        str(totals.sessions),
        f"{totals.serving_s / 3600:.1f} h",
        f"{totals.working_s / 3600:.1f} h",
        format_data(totals.sent_bytes),
        format_data(totals.received_bytes),
    ]
