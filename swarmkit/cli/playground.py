"""`swarmkit playground`: a page to chat with a model, and to watch the swarm while it answers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import (
    Allow,
    Block,
    IdentityFile,
    Join,
    Json,
    Model,
    SwarmKeyFile,
    Threads,
    Verbose,
    app,
)
from swarmkit.cli.interrupt import interruptible
from swarmkit.cli.page import check_installed, show_page
from swarmkit.errors import UsageError


@app.command()
def playground(
    model: Model = "tiny-chat",
    join: Join = None,
    swarm_key: SwarmKeyFile = None,
    identity: IdentityFile = None,
    allow: Allow = None,
    block: Block = None,
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
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page, where there is a display.")
    ] = True,
    threads: Threads = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Open a page to chat with a model, and to watch the swarm while it answers, until Ctrl-C.

    Without --join, four server processes are started on this machine, which the page can kill.

    Examples:

        swarmkit playground

        swarmkit playground Qwen/Qwen3-32B --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo…
    """
    console.setup(verbose, threads)
    console.quiet_transformers()
    console.set_threads(threads)
    check_installed()
    if also and not join:
        raise UsageError("--also names further models of a swarm; give the swarm's address with --join")
    from swarmkit.cli.joining import model_of

    with ExitStack() as owned:
        if join:
            swarm = None
            names = [model, *(also or ())]
            joined = [model_of(name, join, swarm_key, identity, allow, block) for name in names]
            models = [owned.enter_context(each) for each in joined]
        else:
            from swarmkit.cli.local_servers import start_servers

            swarm = owned.enter_context(start_servers(model))
            models = [swarm.model()]
        with interruptible():
            show_page(models, swarm, host, port, password, max_running, browser, json)
