"""`swarmkit swarm-key`: the key of a private swarm, and the certificates of its members."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swarmkit.cli import console
from swarmkit.cli.app import IdentityFile, Join, Json, app
from swarmkit.errors import UsageError

if TYPE_CHECKING:
    from swarmkit.net.transport.identity import Identity
    from swarmkit.net.transport.swarm_key import SwarmKey

commands = typer.Typer(
    help="Make the key of a private swarm, and say who may do what in it.", no_args_is_help=True
)
app.add_typer(commands, name="swarm-key")

KeyFile = Annotated[str, typer.Argument(metavar="FILE", help="The file with the swarm's key.")]
Out = Annotated[str, typer.Option("--out", metavar="FILE", help="Where to write it; it must not exist yet.")]


@commands.command()
def create(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write it; it must not exist yet.")],
    owner: Annotated[
        str | None,
        typer.Option("--owner", metavar="FILE", help="An identity file, made if needed: the swarm's owner."),
    ] = None,
) -> None:
    """Make the key of a private swarm and write it to a file that only you can read. It is never shown.

    Copy the file to each machine of the swarm by a way that you trust. Peers without it can open no stream to
    peers with it, and their records are neither read nor kept.

    With `--owner`, the key alone admits nobody but the owner. The owner signs certificates for all others,
    with `swarmkit swarm-key sign` or `swarmkit invite`, and can take them back. Keep the owner's file apart.

    Examples:

        swarmkit swarm-key create ~/.swarmkit/team.key

        swarmkit serve tiny-chat --swarm-key ~/.swarmkit/team.key

        swarmkit swarm-key create team.key --owner owner.key
    """
    from pathlib import Path

    from swarmkit.net.transport.identity import Identity
    from swarmkit.net.transport.swarm_key import SwarmKey

    name = Identity.load_or_create(Path(owner)).peer_id if owner else ""
    SwarmKey(owner=name).save(file)
    if owner:
        console.err.print(
            f"[green]●[/] wrote {file} for the owner, {name}; sign certificates for others with\n"
            f"  swarmkit swarm-key sign {file} --identity {owner} --peer PEER --out MEMBER_FILE",
            soft_wrap=True,
        )
    else:
        console.err.print(f"[green]●[/] wrote {file}; all peers of the swarm need it, with --swarm-key FILE")


@commands.command()
def sign(
    file: KeyFile,
    out: Out,
    identity: IdentityFile = None,
    peer: Annotated[
        str | None,
        typer.Option("--peer", metavar="PEER", help="The member's peer id; without it, one is made."),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", metavar="ROLE", help="serve, use or invite; may be repeated. Default: use."),
    ] = None,
    days: Annotated[float, typer.Option("--days", min=0.001, help="For how many days it is good.")] = 365.0,
) -> None:
    """Sign a certificate for a member, and write a key file for it.

    A member with the role invite may sign as well, with its own key file and identity: what it may do itself,
    and no longer than it may itself. Servers need the role serve, and use as well if they ask other servers.

    Examples:

        swarmkit swarm-key sign team.key --identity owner.key --peer 12D3Koo… --role serve --out server.key

        swarmkit serve tiny-chat --swarm-key server.key --identity me.key
    """
    from swarmkit.clock import SYSTEM_CLOCK
    from swarmkit.net.transport.swarm_key import SwarmKey

    expires_at = SYSTEM_CLOCK.time() + days * 86_400
    key, _ = signed_key(SwarmKey.load(file), identity, peer, role or ["use"], expires_at)
    key.save(out)
    assert key.members is not None
    whose = key.members.chain[-1].certificate
    console.err.print(
        f"[green]●[/] wrote {out}: peer {whose.subject} may {', '.join(whose.roles)}", soft_wrap=True
    )


@commands.command()
def revoke(
    file: KeyFile,
    identity: IdentityFile = None,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", metavar="PEER", help="A member; may be repeated.")
    ] = None,
    serial: Annotated[
        list[str] | None,
        typer.Option("--serial", metavar="HEX", help="One certificate, as `show` names it; may be repeated."),
    ] = None,
    join: Join = None,
) -> None:
    """Take back certificates, as the owner of the swarm, and all that members signed below them.

    The list is kept beside the key file. With `--join` it is put into the swarm's table, from where all peers
    learn it within seconds and hand it on; it can be put there again at any time.

    Examples:

        swarmkit swarm-key revoke team.key --identity owner.key --peer 12D3Koo… --join /ip4/…
    """
    from swarmkit.net.transport.certificates import Revocations, sign_revocations
    from swarmkit.net.transport.swarm_key import SwarmKey

    key = SwarmKey.load(file)
    members = key.members
    signer = _signer(key, identity)
    if members is None or signer.peer_id != members.owner:
        raise UsageError("only the owner of a swarm takes back certificates; give --identity OWNER_FILE")
    before = members.revocations or Revocations(key.swarm, members.owner, 0)
    try:
        serials = {*before.serials, *(bytes.fromhex(each) for each in serial or ())}
    except ValueError:
        raise UsageError("--serial takes what `swarmkit swarm-key show` names as the serial") from None
    peers = {*before.peers, *(peer or ())}
    if (serials, peers) != (set(before.serials), set(before.peers)):
        revocations = Revocations(
            key.swarm, members.owner, before.number + 1, tuple(sorted(serials)), tuple(sorted(peers))
        )
        members.learn(sign_revocations(signer, revocations))
    elif not members.signed_revocations:
        raise UsageError("nothing was taken back yet; give --peer PEER or --serial HEX")
    spread = _spread(key, signer, join) if join else 0
    where = "and put it into the table" if spread else "which peers learn from the table: give --join"
    if join and not spread:
        raise UsageError("no peer of the swarm took the list; it is kept beside the key file, try again")
    console.err.print(
        f"[green]●[/] {len(peers)} peers and {len(serials)} certificates are on the list, {where}",
        soft_wrap=True,
    )


@commands.command()
def show(file: KeyFile, json: Json = False) -> None:
    """Say what a key file allows, without its secrets.

    Examples:

        swarmkit swarm-key show server.key
    """
    from swarmkit.net.transport.certificates import describe
    from swarmkit.net.transport.swarm_key import SwarmKey

    key = SwarmKey.load(file)
    members = key.members
    chain = describe(members.chain) if members is not None else []
    taken_back = members.revocations if members is not None else None
    if json:
        console.emit_json(
            swarm=key.swarm.hex(),
            owner=members.owner if members else None,
            identity=key.identity.peer_id if key.identity else None,
            certificates=chain,
            revoked_peers=list(taken_back.peers) if taken_back else [],
            revoked_serials=[each.hex() for each in taken_back.serials] if taken_back else [],
        )
        return
    console.out.print(f"swarm  {key.swarm.hex()}")
    if members is None:
        console.out.print("It has no owner: whoever has the key may do all.")
        return
    console.out.print(f"owner  {members.owner}", soft_wrap=True)
    for each in (signed.certificate for signed in members.chain):
        console.out.print(
            f"peer {each.subject} may {', '.join(each.roles)} until {console.date(each.expires_at)}; "
            f"signed by {each.issuer}, serial {each.serial.hex()}",
            soft_wrap=True,
        )
    if not chain:
        console.out.print("There is no certificate in it: it is the owner's.")
    if taken_back is not None:
        named = [*taken_back.peers, *(each.hex() for each in taken_back.serials)]
        console.out.print(f"taken back: {', '.join(named)}", soft_wrap=True)


def signed_key(
    key: SwarmKey, identity: str | None, peer: str | None, roles: list[str], expires_at: float
) -> tuple[SwarmKey, float]:
    """The key of another member, with a certificate that is signed by the holder of this one.

    Args:
        identity: the signer's identity file; that of the key if not given.
        peer: the member's peer id; a new identity comes with the key if not given.
        expires_at: Unix time, seconds; the signer's own expiry, if that is earlier.

    Returns: the key, and when it expires.

    Raises:
        UsageError: the signer may not sign this.
    """
    from swarmkit.net.transport.certificates import ROLES, expiry_of, issue
    from swarmkit.net.transport.identity import Identity

    if unknown := set(roles) - ROLES:
        raise UsageError(f"there is no role {', '.join(sorted(unknown))}; roles are serve, use and invite")
    members = key.members
    if members is None:
        raise UsageError(
            "this swarm has no owner; make its key with `swarmkit swarm-key create --owner FILE`"
        )
    signer = _signer(key, identity)
    key.check_own(signer.peer_id)
    made = None if peer else Identity()
    expires_at = min(expires_at, expiry_of(members.chain))
    subject = peer or (made.peer_id if made else "")
    chain = issue(
        signer,
        members.chain,
        swarm=key.swarm,
        subject=subject,
        roles=roles,  # type: ignore[arg-type]
        expires_at=expires_at,
    )
    signed = key.for_member(chain, made)
    assert signed.members is not None
    if fault := signed.members.fault_of(subject, signed.members.shown):
        raise UsageError(f"peer {signer.peer_id} may not sign this certificate: {fault}")
    return signed, expires_at


def _signer(key: SwarmKey, identity: str | None) -> Identity:
    """Who signs: the peer of the identity file, else the one whose identity came with the key.

    Raises:
        UsageError: there is neither.
    """
    from pathlib import Path

    from swarmkit.net.transport.identity import Identity

    if identity is not None:
        return Identity.load_or_create(Path(identity))
    if key.identity is None:
        raise UsageError("who signs? give --identity FILE: the owner's, or that of a member that may invite")
    return key.identity


def _spread(key: SwarmKey, owner: Identity, join: list[str]) -> int:
    """Put the newest list into the table. Returns how many peers' keys took it."""
    from swarmkit.net import portal
    from swarmkit.net.connect import over_hivemind
    from swarmkit.net.registry.acceptance import acceptable_now
    from swarmkit.net.registry.member_transport import MemberTransport

    with portal.lease() as lease:
        factory = over_hivemind(join, client_mode=True, swarm_key=key)
        transport = lease.call(factory, owner, acceptable_now)
        assert isinstance(transport, MemberTransport)
        try:
            return lease.call(transport.hand_on)
        finally:
            lease.call(transport.close)
