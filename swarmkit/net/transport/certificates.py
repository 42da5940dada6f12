"""Certificates of a private swarm's members, and the list of those that were taken back.

The owner of a swarm signs certificates: the bearer, who is known by the peer id that every transport
authenticates, may do so and so until then. A bearer with the role `invite` may sign further ones, which allow
no more and last no longer than its own. So each member shows a chain::

    owner ── signs ──▶ certificate of A (serve, use, invite) ── A signs ──▶ certificate of B (use)
                                                                            └── shown by B, with A's

A certificate is taken back by its serial number, and a member by its peer id, on a list that the owner signs;
whatever hangs below is void with it. Lists are numbered, and the highest number counts.

Everything here is pure. What is read comes from strangers: it is bounded, and believed only where signed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Literal, get_args

import msgspec

from swarmkit.errors import ProtocolError, UsageError
from swarmkit.net.transport.identity import Identity, verify

Role = Literal["serve", "use", "invite"]
"""What a member may do: serve models and keep records of it, use them, and sign certificates for others."""

ROLES: frozenset[Role] = frozenset(get_args(Role))

MAX_CHAIN = 4
"""Certificates from the owner to a member."""
MAX_CHAIN_BYTES = 2048
MAX_REVOCATIONS_BYTES = 48 * 1024
"""A list stands in one record of the shared table."""

_CERTIFICATE = b"swarmkit member certificate 1\n"
_REVOCATIONS = b"swarmkit revocations 1\n"

SwarmId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
PeerName = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern="^[1-9A-HJ-NP-Za-km-z]+$")]
Serial = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
UnixTime = Annotated[float, msgspec.Meta(ge=0.0, le=1e11)]
"""Seconds, up to the year 5138, so that each is a date."""
_Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

Verify = Callable[[str, bytes, bytes], bool]
"""`verify(peer_id, data, signature)`; see `swarmkit.net.transport.identity.verify`."""


class Certificate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the issuer allows the subject.

    Attributes:
        swarm: which swarm, so that one owner's swarms do not open each other.
        issuer, subject: peer ids.
        expires_at: Unix time, seconds.
        serial: drawn at random; by it the certificate is taken back.
    """

    swarm: SwarmId
    issuer: PeerName
    subject: PeerName
    roles: Annotated[tuple[Role, ...], msgspec.Meta(min_length=1, max_length=3)]
    expires_at: UnixTime
    serial: Serial


class Revocations(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The owner's list of what is taken back.

    Attributes:
        number: the highest one counts.
        peers: members of which every certificate is void.
    """

    swarm: SwarmId
    owner: PeerName
    number: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    serials: tuple[Serial, ...] = ()
    peers: tuple[PeerName, ...] = ()


class _SignedPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_REVOCATIONS_BYTES)]
    signature: _Signature


class SignedCertificate(msgspec.Struct, frozen=True):
    """A certificate with what proves it: the bytes that were signed, and the signature."""

    certificate: Certificate
    body: bytes
    signature: bytes


Chain = tuple[SignedCertificate, ...]

_chain_decoder = msgspec.msgpack.Decoder(
    Annotated[tuple[_SignedPart, ...], msgspec.Meta(max_length=MAX_CHAIN)]
)
_certificate_decoder = msgspec.msgpack.Decoder(Certificate)
_list_decoder = msgspec.msgpack.Decoder(_SignedPart)
_revocations_decoder = msgspec.msgpack.Decoder(Revocations)
_encode = msgspec.msgpack.Encoder().encode
_UNREADABLE = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)


# making


def issue(
    issuer: Identity,
    chain: Chain,
    *,
    swarm: bytes,
    subject: str,
    roles: Collection[Role],
    expires_at: float,
    serial: bytes | None = None,
) -> Chain:
    """Sign a certificate for a member. Returns its chain.

    Whether the issuer may sign it is not asked here, but by everybody who is shown it.

    Args: chain: the issuer's own; empty for the owner.

    Raises:
        UsageError: something about it cannot be, such as a peer id that is none.
    """
    certificate = Certificate(
        swarm,
        issuer.peer_id,
        subject,
        tuple(sorted(set(roles))),
        float(expires_at),
        secrets.token_bytes(8) if serial is None else serial,
    )
    body = _encode(certificate)
    try:
        _certificate_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise UsageError(f"no certificate can be made of this: {error}") from None
    if len(chain) >= MAX_CHAIN:
        raise UsageError(f"there are {MAX_CHAIN} certificates from the owner to this peer already: ask them")
    return (*chain, SignedCertificate(certificate, body, issuer.sign(_CERTIFICATE + body)))


def write_chain(chain: Chain) -> bytes:
    """A chain as it is stored and shown."""
    return _encode([_SignedPart(each.body, each.signature) for each in chain])


def sign_revocations(owner: Identity, revocations: Revocations) -> bytes:
    """The list as peers believe it.

    Raises:
        UsageError: it is too long.
    """
    body = _encode(revocations)
    data = _encode(_SignedPart(body, owner.sign(_REVOCATIONS + body)))
    if len(data) > MAX_REVOCATIONS_BYTES:
        raise UsageError("the list of revocations is full; make a new swarm key and new certificates")
    return data


# reading


def read_chain(data: bytes) -> Chain:
    """A chain of which nothing is believed yet.

    Raises:
        ProtocolError: it is too large or malformed.
    """
    if len(data) > MAX_CHAIN_BYTES:
        raise ProtocolError(f"a chain of certificates of {len(data)} bytes is larger than {MAX_CHAIN_BYTES}")
    try:
        return tuple(
            SignedCertificate(_certificate_decoder.decode(part.body), part.body, part.signature)
            for part in _chain_decoder.decode(data)
        )
    except _UNREADABLE as error:
        raise ProtocolError(f"not a chain of certificates: {error}") from None


def read_revocations(data: bytes, verify: Verify = verify) -> Revocations:
    """A list that is signed by the owner that it names.

    Raises:
        ProtocolError: it is too large, malformed, or not signed so.
    """
    if len(data) > MAX_REVOCATIONS_BYTES:
        raise ProtocolError(f"a list of revocations of {len(data)} bytes is too large")
    try:
        signed = _list_decoder.decode(data)
        found = _revocations_decoder.decode(signed.body)
    except _UNREADABLE as error:
        raise ProtocolError(f"not a list of revocations: {error}") from None
    if not verify(found.owner, _REVOCATIONS + signed.body, signed.signature):
        raise ProtocolError("the list of revocations is not signed by its owner", found.owner)
    return found


# judging


def fault_in_chain(chain: Chain, swarm: bytes, owner: str, subject: str, verify: Verify = verify) -> str:
    """What is wrong with a chain for ever: it is forged, of another swarm or peer, or allows too much.

    Returns: what is wrong, for people; empty if it is good.
    """
    if not chain:
        return "" if subject == owner else "it shows no certificate of this swarm"
    issuer, allowed, until = owner, ROLES, float("inf")
    for number, signed in enumerate(chain):
        certificate = signed.certificate
        if certificate.swarm != swarm:
            return "its certificate is of another swarm"
        if certificate.issuer != issuer or not verify(issuer, _CERTIFICATE + signed.body, signed.signature):
            return "its certificate was not signed by who may sign it"
        if number and "invite" not in allowed:
            return f"its certificate was signed by peer {issuer}, which may not invite"
        if not allowed >= set(certificate.roles):
            return "its certificate allows more than the one of its signer"
        if not certificate.expires_at <= until:
            return "its certificate lasts longer than the one of its signer"
        issuer, allowed, until = certificate.subject, frozenset(certificate.roles), certificate.expires_at
    return "" if issuer == subject else "its certificate is of another peer"


def fault_now(chain: Chain, now: float, revoked: Revocations | None, subject: str) -> str:
    """What is wrong with a chain at present: it has expired, or is taken back; empty if it is good.

    Args: now: Unix time, seconds.
    """
    certificates = [signed.certificate for signed in chain]
    if any(not now < each.expires_at for each in certificates):
        return "its certificate has expired; ask for a new one"
    if revoked is not None and (
        any(each.serial in revoked.serials for each in certificates)
        or any(name in revoked.peers for name in (subject, *(each.subject for each in certificates)))
    ):
        return "its certificate was taken back by the owner of the swarm"
    return ""


def roles_in(chain: Chain) -> frozenset[Role]:
    """What the bearer of a good chain may do; the owner, whose chain is empty, may do all."""
    return frozenset(chain[-1].certificate.roles) if chain else ROLES


def expiry_of(chain: Chain) -> float:
    """When a chain expires (Unix time, seconds); the owner's never does."""
    return min((signed.certificate.expires_at for signed in chain), default=float("inf"))


def lacks(roles: Collection[Role], needed: Collection[Role]) -> str:
    """What a member is told that has none of the roles of which it needs one; empty if it has one."""
    if not needed or set(roles) & set(needed):
        return ""
    return f"its certificate does not allow it to {' or to '.join(sorted(needed))}"


def describe(chain: Sequence[SignedCertificate]) -> list[dict[str, object]]:
    """A chain for people and programs, from the owner on."""
    return [
        {
            "issuer": each.certificate.issuer,
            "peer_id": each.certificate.subject,
            "roles": list(each.certificate.roles),
            "expires_at": each.certificate.expires_at,
            "serial": each.certificate.serial.hex(),
        }
        for each in chain
    ]
