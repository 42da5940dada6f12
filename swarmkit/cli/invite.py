"""`swarmkit invite`: one line that lets another peer join."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import IdentityFile, Join, Json, SwarmKeyFile, app
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.net.transport.invite import InviteLink

Roles = Annotated[
    list[str] | None,
    typer.Option("--role", metavar="ROLE", help="serve, use or invite; may be repeated. Default: use."),
]
Days = Annotated[float, typer.Option("--days", min=0.001, help="For how many days it is good.")]
Peer = Annotated[
    str | None,
    typer.Option("--peer", metavar="PEER", help="For this peer id only, as `swarmkit identity` prints it."),
]


@app.command()
def invite(
    join: Join = None,
    swarm_key: SwarmKeyFile = None,
    identity: IdentityFile = None,
    role: Roles = None,
    peer: Peer = None,
    days: Days = 30.0,
    model: Annotated[str, typer.Option("--model", help="Say which model the swarm is for.")] = "",
    show: Annotated[
        str | None, typer.Option("--show", metavar="LINK", help="Say what is in a link instead.")
    ] = None,
    json: Json = False,
) -> None:
    """Print an invite link: one line that is taken wherever `--join` takes an address.

    The link holds the addresses of `--join`, and for a private swarm its key. So pass it on as you would a
    password. Where the swarm has an owner, the link also holds a certificate, which `--identity` signs: that
    of the owner, or of a member with the role invite. Without `--peer`, a new identity comes with the link,
    and one peer at a time can use it.

    Examples:

        swarmkit invite --join /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo…

        swarmkit invite --join … --swarm-key team.key --identity owner.key --role use --role serve --days 90

        swarmkit chat tiny-chat --join swarmkit:AQBn…
    """
    from swarmkit.clock import SYSTEM_CLOCK
    from swarmkit.net.transport.invite import InviteLink, joined_links, read_link, write_link
    from swarmkit.net.transport.swarm_key import SwarmKey

    now = SYSTEM_CLOCK.time()
    if show is not None:
        _show(read_link(show, now), json)
        return
    if not join:
        raise UsageError(
            "give --join ADDRESS: the link leads to that peer, as `swarmkit bootstrap` prints it"
        )
    addresses, key = joined_links(join, now)
    key = SwarmKey.load(swarm_key) if swarm_key else key
    expires_at = now + days * 86_400
    if key is not None and key.members is not None:
        from swarmkit.cli.swarm_key import signed_key

        key, expires_at = signed_key(key, identity, peer, role or ["use"], expires_at)
    elif role or peer:
        raise UsageError("--role and --peer need the key of a swarm with an owner, with --swarm-key FILE")
    made = InviteLink(tuple(addresses), expires_at, key.to_bytes() if key is not None else b"", model)
    link = write_link(made)
    if json:
        console.emit_json(link=link, expires_at=expires_at, addresses=addresses)
        return
    console.out.print(link, soft_wrap=True)
    console.err.print(
        f"[green]●[/] good until {console.date(expires_at)}; others join with --join and this line",
        soft_wrap=True,
    )


def _show(link: InviteLink, json: bool) -> None:
    from swarmkit.net.transport.certificates import describe

    key = link.swarm_key()
    chain = describe(key.members.chain) if key is not None and key.members is not None else []
    if json:
        console.emit_json(
            addresses=list(link.addresses),
            expires_at=link.expires_at,
            model=link.model,
            private=key is not None,
            certificates=chain,
        )
        return
    for address in link.addresses:
        console.out.print(f"leads to    {address}", soft_wrap=True)
    console.out.print(f"good until  {console.date(link.expires_at)}")
    if link.model:
        console.out.print(f"for         {link.model}")
    console.out.print(f"swarm       {'open' if key is None else 'private'}")
    if key is not None and key.members is not None and key.members.chain:
        last = key.members.chain[-1].certificate
        console.out.print(f"allows      {', '.join(last.roles)}, to peer {last.subject}", soft_wrap=True)
