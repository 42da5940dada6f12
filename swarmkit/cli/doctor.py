"""`swarmkit doctor`: is this machine fit to take part?"""

from __future__ import annotations

import typer
from rich.table import Table

from swarmkit.cli import console
from swarmkit.cli.app import Announce, Host, IdentityFile, Join, Json, Port, SwarmKeyFile, Verbose, app

_MARKS = {
    "ok": "[green]✓[/]",
    "warning": "[yellow]![/]",
    "failure": "[bold red]✗[/]",
    "unknown": "[dim]–[/]",
}


@app.command()
def doctor(
    join: Join = None,
    host: Host = "0.0.0.0",
    port: Port = 0,
    announce: Announce = None,
    identity: IdentityFile = None,
    swarm_key: SwarmKeyFile = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Look at this machine and its network, and say what to do about what is wrong.

    Looks at versions, limits, memory, disk and GPU, and starts a p2p daemon as a server would. With `--join`
    it joins the swarm, compares the clock, and asks the peers that were given to dial back, which tells
    whether this machine is behind a NAT or a firewall; and if it is, whether another peer passes connections
    on to it.

    Exits with code 1 if something keeps this machine from taking part, and with 2 if something makes it of
    less use.

    Examples:

        swarmkit doctor

        swarmkit doctor --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo… --port 31337

        swarmkit doctor --json | jq '.findings[] | select(.state != "ok")'
    """
    console.setup(verbose)
    from swarmkit.clock import SYSTEM_CLOCK
    from swarmkit.net import portal
    from swarmkit.net.connect import in_lan, over_hivemind, swarm_key_of
    from swarmkit.net.transport.invite import joined_links
    from swarmkit.node.doctor import examine, look

    given, from_link = joined_links(join or (), SYSTEM_CLOCK.time())
    key = swarm_key_of(swarm_key) or from_link
    with console.busy("looking"), portal.lease() as lease:
        peers = lease.call(in_lan, given, key.swarm.hex() if key is not None else "")
        factory = over_hivemind(
            peers, host=host, port=port, announce=announce or (), use_relay=True, swarm_key=key
        )
        findings = examine(lease.call(look, factory, peers, identity))
    states = {finding.state for finding in findings}
    if json:
        console.emit_json(ok="failure" not in states, findings=[each.to_json() for each in findings])
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for finding in findings:
            text = finding.found if not finding.advice else f"{finding.found}\n[bold]→[/] {finding.advice}"
            table.add_row(_MARKS[finding.state], finding.name, text)
        console.out.print(table)
    if "failure" in states:
        raise typer.Exit(1)
    if "warning" in states:
        raise typer.Exit(2)
