"""`swarmkit api`: a model of a swarm behind OpenAI's and Anthropic's protocols."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import Json, Model, app
from swarmkit.cli.options import ProcessOptions, SwarmOptions, with_groups
from swarmkit.cli.signals import EndRequest, end_request
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERYBODY = ("0.0.0.0", "::")


@app.command()
@with_groups
def api(
    swarm: SwarmOptions,
    process: ProcessOptions,
    model: Model = "tiny-chat",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; other than loopback needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 = any free port.")] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="What clients call the model; may be repeated, the first is told."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="SWARMKIT_API_KEY",
            help="A key that clients must give; may be repeated. Other users of this machine can see it: "
            "better use the variable or the file.",
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option("--api-keys-file", help="A file with one key per line.")
    ] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Let everybody who reaches the address use the model.")
    ] = False,
    max_running: Annotated[
        int | None, typer.Option("--max-running", min=1, max=1024, help="Requests answered at a time.")
    ] = None,
    max_waiting: Annotated[
        int | None, typer.Option("--max-waiting", min=0, help="Requests that wait for their turn.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer.")] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option("--max-body-bytes", min=1, help="Largest body of a request.")
    ] = None,
    json: Json = False,
) -> None:
    """Serve a model over HTTP, by OpenAI's and Anthropic's protocols, until Ctrl-C.

    Examples:

        swarmkit api tiny-chat

        swarmkit api Qwen/Qwen3-32B --join /ip4/192.0.2.7/… --host 0.0.0.0 --api-keys-file keys.txt
    """
    process.prepare()
    keys = [*(api_key or ()), *_keys_in(api_keys_file)]
    is_local = host in _LOOPBACK
    if not keys and not is_local and not without_keys:
        raise UsageError(
            f"everybody who reaches {host} could use the model: give keys with --api-keys-file FILE, or say "
            "--without-keys if that is meant"
        )
    try:
        from swarmkit.api.app import create_app
    except ImportError as error:
        raise UsageError(
            f"the HTTP API needs {error.name}; install it with `pip install 'swarmkit-llm[api]'`"
        ) from None
    from swarmkit.settings import ApiSettings

    wishes = {
        "max_running": max_running,
        "max_waiting": max_waiting,
        "max_tokens": max_tokens,
        "max_body_bytes": max_body_bytes,
    }
    settings = ApiSettings().replace(**{key: value for key, value in wishes.items() if value is not None})
    with swarm.model(model) as remote, end_request() as end:
        end.is_orderly = True
        names = name or [remote.connection.client.model.name]
        application = create_app(
            remote,
            name=names[0],
            aliases=names[1:],
            api_keys=keys,
            local_only=is_local and not keys,
            settings=settings,
        )
        asyncio.run(_serve(application, host, port, names[0], end, json))


async def _serve(application: FastAPI, host: str, port: int, name: str, end: EndRequest, json: bool) -> None:
    from swarmkit.api.serving import ApiAddress, serving

    async with serving(application, host, port) as listening:
        shown = ApiAddress("127.0.0.1", listening.port) if host in _EVERYBODY else listening
        if json:
            console.emit_json(event="listening", url=shown.url, model=name)
        else:
            console.out.print(f"[green]●[/] {name} answers at {shown.url}/v1", soft_wrap=True)
            console.out.print("Press Ctrl-C to end.", style="dim")
        await asyncio.get_running_loop().run_in_executor(None, end.wait)


def _keys_in(path: Path | None) -> list[str]:
    """The keys of a file, which has one on each line; lines that begin with # are comments."""
    if path is None:
        return []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UsageError(f"the keys in {path} cannot be read: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise UsageError(f"{path} has no keys; write one on each line")
    return keys
