"""`swarmkit tray`: the icon with which a person lends their computer."""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Verbose, app
from swarmkit.errors import UsageError


@app.command()
def tray(
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page of the tray that runs already, and end.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Print the page's address instead of opening a browser.")
    ] = False,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Where the icon goes: auto, status-notifier (Linux panels, over D-Bus), pystray, or none "
            "(the pages in a browser only).",
        ),
    ] = "auto",
    verbose: Verbose = False,
) -> None:
    """Lend this computer while you do not use it: an icon with a menu, and pages with settings.

    Nothing is served until you have chosen what to lend. The worker is started if none runs.

    Examples:

        swarmkit tray

        swarmkit tray --open

        swarmkit tray --host none --link
    """
    console.setup(verbose, None)
    if host not in ("auto", "status-notifier", "pystray", "none"):
        raise UsageError("--host is one of auto, status-notifier, pystray and none")
    try:
        from swarmkit_app.tray import program
    except ImportError as error:
        raise UsageError(
            f'the tray needs {error.name}; install it with `pip install "swarmkit-llm[tray]"`'
        ) from error
    from swarmkit.worker.places import WorkerPlaces

    if open_page:
        program.open_running(WorkerPlaces.of_this_person(), "dashboard")
        return
    show: Any = {"show_page": print} if link else {}
    chosen = program.host_here(host, lambda: running.open())  # type: ignore[arg-type]
    running = program.Tray(chosen, **show)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: chosen.stop())
    running.run()
