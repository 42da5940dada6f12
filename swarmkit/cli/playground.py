"""`swarmkit playground`: a page to chat with a model, and to watch the swarm while it answers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from swarmkit.cli.app import Json, Model, app
from swarmkit.cli.interrupt import interruptible
from swarmkit.cli.options import ProcessOptions, SwarmOptions, with_groups
from swarmkit.cli.page import check_installed, show_page
from swarmkit.errors import UsageError


@app.command()
@with_groups
def playground(
    swarm: SwarmOptions,
    process: ProcessOptions,
    model: Model = "tiny-chat",
    also: Annotated[
        list[str] | None, typer.Option("--also", help="A further model of the swarm to choose; repeatable.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; other than loopback needs a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 = any free port.")] = 0,
    password: Annotated[
        str | None,
        typer.Option(
            "--password",
            envvar="SWARMKIT_PLAYGROUND_PASSWORD",
            help="What visitors must give. Other users of this machine can see it: better use the variable.",
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option("--max-running", min=1, max=64, help="Answers at a time; others wait.")
    ] = 8,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, max=1000, help="Answers that wait; more are refused.")
    ] = 64,
    answers_per_minute: Annotated[
        int | None,
        typer.Option(
            "--answers-per-minute",
            min=1,
            help="Answers that each visitor may ask for; any number by default.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="The longest answer that a visitor may ask for.")
    ] = 2048,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page, where there is a display.")
    ] = True,
    json: Json = False,
) -> None:
    """Open a page to chat with a model, and to watch the swarm while it answers, until Ctrl-C.

    Without --join, four server processes are started on this machine, which the page can kill.

    Examples:

        swarmkit playground

        swarmkit playground Qwen/Qwen3-32B --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo…
    """
    process.prepare()
    check_installed()
    if also and not swarm.join:
        raise UsageError("--also names further models of a swarm; give the swarm's address with --join")
    with ExitStack() as owned:
        here = None
        if swarm.join:
            models = [owned.enter_context(swarm.model(name)) for name in [model, *(also or ())]]
        else:
            from swarmkit.cli.local_servers import start_servers

            here = owned.enter_context(start_servers(model))
            models = [here.model()]
        with interruptible():
            show_page(
                models,
                here,
                browser,
                json,
                host=host,
                port=port,
                password=password,
                max_running=max_running,
                max_waiting=max_waiting,
                answers_per_minute=answers_per_minute,
                max_tokens=max_tokens,
            )
