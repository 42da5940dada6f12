"""`swarmkit bootstrap`: a fixed address through which others find each other."""

from __future__ import annotations

from swarmkit.cli import console
from swarmkit.cli.app import Announce, Host, IdentityFile, Join, Json, Port, SwarmKeyFile, Verbose, app
from swarmkit.cli.signals import end_request


@app.command()
def bootstrap(
    join: Join = None,
    host: Host = "127.0.0.1",
    port: Port = 0,
    announce: Announce = None,
    identity: IdentityFile = None,
    swarm_key: SwarmKeyFile = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a peer that serves no model: a meeting point with an address that stays the same.

    Examples:

        swarmkit bootstrap --host 0.0.0.0 --port 31337 --identity ~/.swarmkit/bootstrap.key
    """
    console.setup(verbose)
    from pathlib import Path

    from swarmkit.net import portal
    from swarmkit.net.connect import over_hivemind
    from swarmkit.net.registry.acceptance import acceptable_now
    from swarmkit.net.transport.identity import Identity

    key = Identity.load_or_create(Path(identity)) if identity else Identity()
    factory = over_hivemind(join or (), host=host, port=port, announce=announce or (), swarm_key=swarm_key)
    with end_request() as end, portal.lease() as lease:
        transport = lease.call(factory, key, acceptable_now)
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
