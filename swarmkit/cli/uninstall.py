"""`swarmkit uninstall`: show what swarmkit has put on this computer, and take it away."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Json, app
from swarmkit.errors import UsageError
from swarmkit.sizes import format_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarmkit.worker.control.values import Belonging
    from swarmkit.worker.removal import RunningProcess


@app.command()
def uninstall(
    what: Annotated[
        bool,
        typer.Option("--what", help="Only show what there is and what room it takes; nothing is changed."),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="KINDS",
            help="What stays, separated by commas: settings, identity, weights, history.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Take swarmkit away from this computer: its processes, its start-up entries and its files.

    It is shown first, and asked about. A worker and a tray that run are ended, and their sessions move away.
    The cache of the Hugging Face Hub, which other programs use too, is not touched.

    Examples:

        swarmkit uninstall --what

        swarmkit uninstall --keep settings,identity

        swarmkit uninstall --yes
    """
    from swarmkit.worker.belongings import belongings
    from swarmkit.worker.removal import RemovalError, kept, remove, running_processes, stop_all, to_remove

    staying = kept(",".join(keep or []).split(","))
    going, processes = to_remove(belongings(), staying), running_processes()
    if what or not json:
        _show(going, processes, json)
    if what:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is there to be asked: say `--yes`, or `--what` to see what would go")
        typer.confirm("Take all of this away?", abort=True)
    advice = _advice()
    with console.busy("ending what runs …"):
        stop_all()
    # Ended processes leave less than there was, and their last words.
    gone: list[Belonging] = []
    left = remove(to_remove(belongings(), staying), on_removed=gone.append)
    freed = sum(part.size_bytes for part in gone)
    if json:
        console.emit_json(removed=[part.path for part in gone], freed_bytes=freed, left=left)
    else:
        console.out.print(f"Taken away; {format_data(freed)} are free again. {advice}".strip())
    if left:
        raise RemovalError("not all could be taken away: " + "; ".join(left))


def _show(going: Sequence[Belonging], processes: Sequence[RunningProcess], json: bool) -> None:
    import msgspec

    total = sum(part.size_bytes for part in going)
    if json:
        console.emit_json(
            parts=msgspec.to_builtins(list(going)),
            size_bytes=total,
            processes=[{"pid": process.pid, "what": process.what} for process in processes],
        )
        return
    for process in processes:
        console.out.print(f"   process  {process.pid}: {process.what}")
    for part in going:
        console.out.print(f"{format_data(part.size_bytes):>10}  {part.what}: {part.path}", soft_wrap=True)
    console.out.print(f"{format_data(total):>10}  in all", soft_wrap=True)


def _advice() -> str:
    """How the program itself goes, where it is not in a folder that an installer made for this person."""
    import os
    from pathlib import Path

    from swarmkit.worker.autostart import LAUNCHER_VARIABLE
    from swarmkit.worker.belongings import program_folder

    if os.environ.get(LAUNCHER_VARIABLE, "").startswith("/usr/"):
        return "The package itself goes with `sudo apt purge swarmkit`."
    if Path(sys.prefix).is_relative_to(program_folder()):
        return ""
    return f"The program itself, in {sys.prefix}, goes with `pip uninstall swarmkit-llm`."
