"""The application that commands add themselves to, and the options that they share."""

from __future__ import annotations

from typing import Annotated

import typer

from swarmkit._version import __version__

Model = Annotated[
    str, typer.Argument(help="`tiny-chat` (comes with swarmkit), a local folder, or a Hub repo id.")
]
Join = Annotated[
    list[str] | None,
    typer.Option(
        "--join",
        "-j",
        metavar="ADDRESS",
        help="A peer to join, an invite link, or lan; may be repeated.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what happens.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads for computing.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, mps, …")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16, int8 or nf4.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for every network.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 = any free port.")]
Announce = Annotated[
    list[str] | None,
    typer.Option("--announce", metavar="ADDRESS", help="Tell others this address instead of our own."),
]
Lan = Annotated[
    bool, typer.Option("--lan", help="Let others in the local network find this peer, by `--join lan`.")
]
IdentityFile = Annotated[
    str | None, typer.Option("--identity", metavar="FILE", help="Keep this peer's key, and so its name.")
]
SwarmKeyFile = Annotated[
    str | None,
    typer.Option("--swarm-key", metavar="FILE", help="The key of a private swarm, made by `swarm-key`."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="PEER", help="Deal only with this peer; may be repeated."),
]
Block = Annotated[
    list[str] | None,
    typer.Option("--block", metavar="PEER", help="Never deal with this peer; may be repeated."),
]

app = typer.Typer(
    name="swarmkit",
    help="Run language models that are too big for any one of your machines, by pooling ordinary ones.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"swarmkit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run language models that are too big for any one of your machines, by pooling ordinary ones."""
