"""`swarmkit swarm-key`: make the key of a private swarm."""

from __future__ import annotations

from typing import Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import app


@app.command("swarm-key")
def swarm_key(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write it; it must not exist yet.")],
) -> None:
    """Make the key of a private swarm and write it to a file that only you can read. It is never shown.

    Copy the file to each machine of the swarm by a way that you trust. Peers without it can open no stream to
    peers with it, and their records are neither read nor kept.

    Examples:

        swarmkit swarm-key ~/.swarmkit/team.key

        swarmkit serve tiny-chat --swarm-key ~/.swarmkit/team.key
    """
    from swarmkit.net.transport.swarm_key import SwarmKey

    SwarmKey().save(file)
    console.err.print(f"[green]●[/] wrote {file}; all peers of the swarm need it, with --swarm-key FILE")
