"""`swarmkit bootstrap`: a fixed address through which others find each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from swarmkit.cli import console
from swarmkit.cli.app import Announce, Host, IdentityFile, Join, Json, Lan, Port, SwarmKeyFile, Verbose, app
from swarmkit.cli.signals import end_request

_MOST_MEETING_POINTS = 64


@app.command()
def bootstrap(
    join: Join = None,
    host: Host = "127.0.0.1",
    port: Port = 0,
    announce: Announce = None,
    identity: IdentityFile = None,
    swarm_key: SwarmKeyFile = None,
    lan: Lan = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a peer that serves no model: a meeting point with an address that stays the same.

    Its identity is kept in a file of this user's, or in that of `--identity`. Give it a `--port` as well, so
    that its whole address stays the same. It passes connections on to servers that were started with
    `--relay`, since nobody can reach them otherwise.

    Examples:

        swarmkit bootstrap --host 0.0.0.0 --port 31337

        swarmkit bootstrap --host 0.0.0.0 --port 31337 --identity ~/.swarmkit/bootstrap.key
    """
    console.setup(verbose)
    from swarmkit.net import portal
    from swarmkit.net.connect import identity_for, over_hivemind
    from swarmkit.net.registry.acceptance import acceptable_now
    from swarmkit.net.rpc.dial_back import DialBackService

    factory = over_hivemind(
        join or (),
        host=host,
        port=port,
        announce=announce or (),
        swarm_key=swarm_key,
        lan=lan,
        is_reachable=True,
    )
    with end_request() as end, portal.lease() as lease, ExitStack() as held:
        if identity is None and factory.identity is None:
            identity = held.enter_context(_kept_identity())
        transport = lease.call(factory, identity_for(factory, identity), acceptable_now)
        lease.call(DialBackService(transport).start)
        end.is_orderly = True
        try:
            if json:
                console.emit_json(
                    event="listening", peer_id=transport.peer_id, addresses=list(transport.addresses)
                )
            else:
                console.err.print("[green]●[/] listening; others join with")
                for address in transport.addresses:
                    console.out.print(f"  --join {address}", soft_wrap=True)
            end.wait()
        finally:
            lease.call(transport.close)


@contextmanager
def _kept_identity() -> Iterator[str | None]:
    """The file with the identity that this user's meeting points have, the first that none of them has now.

    None where nothing can be kept.
    """
    from pathlib import Path

    import platformdirs
    from filelock import FileLock, Timeout

    folder = Path(platformdirs.user_state_dir("swarmkit"))
    for number in range(1, _MOST_MEETING_POINTS + 1):
        file = folder / f"bootstrap-{number}.key"
        lock = FileLock(f"{file}.lock", timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            continue
        except OSError as error:
            console.err.print(
                f"[yellow]●[/] the identity cannot be kept in {folder}: {error}; it is a new one"
            )
            break
        try:
            yield str(file)
        finally:
            lock.release()
        return
    yield None
