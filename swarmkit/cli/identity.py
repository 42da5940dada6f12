"""`swarmkit identity`: the peer id of an identity file."""

from __future__ import annotations

from typing import Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import app


@app.command()
def identity(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file; it is made if there is none.")],
) -> None:
    """Print the peer id of an identity file, by which others name its peer in `--allow` and `--block`.

    Examples:

        swarmkit identity ~/.swarmkit/me.key

        swarmkit serve tiny-chat --allow "$(swarmkit identity me.key)"
    """
    from pathlib import Path

    from swarmkit.net.transport.identity import Identity

    console.out.print(Identity.load_or_create(Path(file)).peer_id, soft_wrap=True)
