"""`swarmkit serve`: lend this machine to a swarm."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from swarmkit.cli import console
from swarmkit.cli.app import (
    Allow,
    Announce,
    Block,
    Device,
    DType,
    Host,
    IdentityFile,
    Join,
    Json,
    Lan,
    Model,
    Port,
    SwarmKeyFile,
    Threads,
    Verbose,
    app,
)
from swarmkit.cli.signals import EndRequest, end_request
from swarmkit.errors import UsageError
from swarmkit.events import Event, LoadProgressed, ServingStarted, following

if TYPE_CHECKING:
    from swarmkit.settings import ServerSettings


@app.command()
def serve(
    model: Model,
    join: Join = None,
    blocks: Annotated[
        str | None, typer.Option("--blocks", metavar="A:B", help="Serve the blocks A, A+1, … B-1.")
    ] = None,
    num_blocks: Annotated[
        str | None,
        typer.Option(
            "--num-blocks",
            metavar="N",
            help="So many, where the swarm is weakest; auto = what fits, also if left out.",
        ),
    ] = None,
    stay: Annotated[
        bool,
        typer.Option("--stay", help="Do not move, even if other blocks need this server more."),
    ] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Plan with so much for auto, as in 24GiB.")
    ] = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    threads: Threads = None,
    name: Annotated[str, typer.Option("--name", help="How others see this server.")] = "",
    host: Host = "127.0.0.1",
    port: Port = 0,
    announce: Announce = None,
    identity: IdentityFile = None,
    swarm_key: SwarmKeyFile = None,
    allow: Allow = None,
    block: Block = None,
    weights_from: Annotated[
        str, typer.Option("--weights-from", help="any, hub, or peers: where blocks may be fetched from.")
    ] = "any",
    fingerprint: Annotated[
        str | None,
        typer.Option(
            "--fingerprint",
            metavar="HEX",
            help="What the model must be; its config then comes from peers instead of the Hub.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="FOLDER_OR_REPO",
            help="Host this LoRA adapter, for clients to choose; may be given several times.",
        ),
    ] = None,
    head: Annotated[
        bool,
        typer.Option("--head", help="Compute the output layer for clients, too; it takes memory of its own."),
    ] = False,
    relay: Annotated[
        bool, typer.Option("--relay", help="Be reachable through the peers of --join, from behind a NAT.")
    ] = False,
    lan: Lan = False,
    json: Json = False,
    verbose: Verbose = False,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Serve some blocks of a model to a swarm.

    Without `--join` this starts a new swarm; the address that is printed lets others join it.

    Without `--blocks` the server takes as many blocks as fit into its memory, where the swarm is weakest. It
    looks now and then whether it is needed more elsewhere, and moves there by itself; clients go on.

    Examples:

        swarmkit serve tiny-chat --blocks 0:4

        swarmkit serve tiny-chat --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo… --num-blocks 4

        swarmkit serve Qwen/Qwen3-32B --join … --device cuda --host 0.0.0.0 --port 31337

        swarmkit serve Qwen/Qwen3-32B --join … --fingerprint 0a1b… --weights-from peers  # without the Hub
    """
    console.setup(verbose, threads)
    with console.importing():
        console.quiet_transformers()
        console.set_threads(threads)
    with end_request(watch_stdin=until_stdin_closes) as end:
        with console.importing():
            from swarmkit.models.checkpoint.checkpoint import Checkpoint
            from swarmkit.net.connect import over_hivemind
            from swarmkit.node.server import Server
            from swarmkit.placement.ranges import parse_blocks
            from swarmkit.server.weights.manifest import open_with_fingerprint
            from swarmkit.server.weights.service import WeightsSettings
            from swarmkit.sizes import parse_bytes

        if weights_from not in ("any", "hub", "peers"):
            raise UsageError(f"--weights-from takes any, hub or peers; got {weights_from!r}")
        weights = WeightsSettings(source=weights_from)  # type: ignore[arg-type]
        if fingerprint is None:
            checkpoint = Checkpoint.open(model)
        else:
            lookup = over_hivemind(join or (), client_mode=True, swarm_key=swarm_key)
            checkpoint = open_with_fingerprint(model, fingerprint, lookup, weights)
        server = Server(
            checkpoint,
            blocks=parse_blocks(blocks, checkpoint.num_blocks) if blocks else None,
            num_blocks=_count(num_blocks, blocks),
            memory_bytes=parse_bytes(memory) if memory else None,
            device=device,
            dtype=dtype,
            public_name=name,
            identity_path=identity,
            adapters=adapter or (),
            weights=weights,
            settings=_settings(allow, block, moves=not (blocks or stay), head=head),
            transport=over_hivemind(
                join or (),
                host=host,
                port=port,
                announce=announce or (),
                use_relay=relay,
                swarm_key=swarm_key,
                lan=lan,
            ),
        )
        show = _Show(json)

        def tell(event: Event) -> None:
            if isinstance(event, ServingStarted):
                end.is_orderly = True  # before a program that reads the events can know
            show.event(event)

        with following(server.events, tell):
            with show:
                server.start()
            gc.freeze()  # no step waits while all that was imported is searched for garbage
            if not json:
                full = checkpoint.full_manifest()
                covering = "" if full is None else full.full_fingerprint
                _show_addresses(model, server.addresses, checkpoint.fingerprint, covering, first=not join)
            _serve_until(server, end)


def _settings(allow: list[str] | None, block: list[str] | None, moves: bool, head: bool) -> ServerSettings:
    """The settings of the environment, with the lists of peers that were given.

    Args:
        moves: whether the server moves by itself.
        head: whether it computes the output layer for clients, whatever the environment says.
    """
    from swarmkit.settings import ServerSettings

    lists = {"allowed_peers": allow, "blocked_peers": block}
    given: dict[str, object] = {name: tuple(peers) for name, peers in lists.items() if peers}
    if head:
        given["offer_head"] = True
    return ServerSettings().replace(**given, moves=moves)


def _count(text: str | None, blocks: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None if blocks else "auto"
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise UsageError(f"--num-blocks takes a number or auto; got {text!r}")
    return int(text)


def _serve_until(server: object, end: EndRequest) -> None:
    """Wait for the end, then leave: at once if no client has a session, else when sessions have moved."""
    import threading

    from swarmkit.node.server import Server

    assert isinstance(server, Server)
    end.wait()
    if end.reason == "stdin":
        server.stop(drain_timeout=0.0)
        return
    leaving = threading.Thread(target=server.stop, name="swarmkit-leave")
    leaving.start()
    while leaving.is_alive():
        if end.skip_drain.is_set():
            server.skip_drain()
        leaving.join(0.1)


def _show_addresses(
    model: str, addresses: list[str], fingerprint: str, full_fingerprint: str, *, first: bool
) -> None:
    if first:
        console.out.print("\nOthers join this swarm with:", style="bold")
        console.out.print(f"  swarmkit serve {model} --join {addresses[0]}", soft_wrap=True)
        console.out.print(f"  swarmkit chat {model} --join {addresses[0]}", soft_wrap=True)
    covering = f", and {full_fingerprint} with the hashes of its blocks" if full_fingerprint else ""
    console.out.print(f"\nThe model's fingerprint is {fingerprint}{covering}.", style="dim", soft_wrap=True)
    console.out.print("Press Ctrl-C to leave; once more to leave at once.", style="dim")


class _Show:
    """A server's events: lines and a bar for people, JSON lines for programs."""

    def __init__(self, json: bool) -> None:
        self._json = json
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=console.err,
            transient=True,
            disable=json,
        )
        self._task = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def event(self, event: Event) -> None:
        if self._json:
            console.emit_json(**event.to_json())
        elif isinstance(event, LoadProgressed):
            self._bar.update(self._task, description=str(event), completed=event.fraction)
        else:
            console.err.print(f"[green]●[/] {event}")
