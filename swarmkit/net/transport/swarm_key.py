"""The shared secret of a private swarm, and what peers do with it.

A peer with a key opens and serves no stream without a proof that the other end has the key as well, and seals
its records, so that peers without the key can neither read them nor have their own records kept. The
transport has authenticated the peer ids of both ends before, and a proof is bound to them, so that it is of
no use to any other peer::

    opener                                    server
      │ ◀──────────────────────────── challenge │
      │ ── nonce, proof of the opener ────────▶ │
      │ ◀────────────────── proof of the server │   or why it refuses
      │ ◀═══════════ what follows in any swarm ═▶ │

Where the swarm has an owner, the two frames with proofs also carry the certificates of their senders, sealed
under the key, and each end lets the other one do only what these allow (`members`).

Proofs are HMAC-SHA256 (RFC 2104) under keys that HKDF (RFC 5869) derives from the secret. Records are sealed
with AES-256-GCM, whose nonce is an HMAC of what is sealed: equal records of one service have equal seals, so
that a record under many keys is verified once.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hmac
import logging
import os
import secrets
import struct
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from swarmkit.errors import NotAdmittedError, ProtocolError, UsageError
from swarmkit.net.transport.certificates import MAX_CHAIN_BYTES, Chain, Role, read_chain
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.members import Members, roles_of_opener, roles_of_server
from swarmkit.net.transport.seam import RecordCheck, Stream, peer_of
from swarmkit.net.transport.secret_file import read_secret, write_secret

logger = logging.getLogger(__name__)

_FILE = "swarm key file"
_HEADER = "swarmkit swarm key 1"
_OWNED_HEADER = "swarmkit swarm key 2"
_SECRET_BYTES = 32
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_SEAL_NONCE_BYTES = 12
_TAG_BYTES = 16
_NAME_BYTES = 16
_OF_RECORDS: frozenset[Role] = frozenset({"serve"})
"""Who keeps records in the table."""

_CHALLENGE = b"swarm key 1\n"
"""How the first frame begins that a server with a key sends."""
_REFUSAL = b"refused\n"
PRIVATE = "its swarm is private: give the swarm's key, with --swarm-key FILE or swarm_key="
_OTHER_KEY = "it does not have the key of this swarm"


class SwarmKey:
    """The key of a private swarm. It is never shown and never sent."""

    def __init__(
        self,
        secret: bytes | None = None,
        *,
        owner: str = "",
        chain: Chain = (),
        identity: Identity | None = None,
    ) -> None:
        """Args:
        secret: 32 secret bytes; fresh random ones if not given.
        owner: the peer id whose signature certificates begin with; none = whoever has the key may do all.
        chain: the certificates of the peer that holds this file.
        identity: the peer's own, where the key came with one.
        """
        secret = secrets.token_bytes(_SECRET_BYTES) if secret is None else secret
        if len(secret) != _SECRET_BYTES:
            raise UsageError(f"a swarm key is made of {_SECRET_BYTES} secret bytes, not {len(secret)}")
        self._secret = secret
        self._proofs = _derived(secret, b"proofs")
        self._nonces = _derived(secret, b"nonces of records")
        self._records = AESGCM(_derived(secret, b"records"))
        self._shown = AESGCM(_derived(secret, b"certificates"))
        self.swarm = _derived(secret, b"name")[:_NAME_BYTES]
        """The id of the swarm, which tells nothing of its secret."""
        self.identity = identity
        self.members = Members(self.swarm, owner, chain) if owner else None
        """Who may do what; None where whoever has the key may do all."""
        self._about_members = owner.encode()
        self._credentials = self._sealed_chain() if self.members else b""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SwarmKey:
        """Read a key that `save` wrote.

        Raises:
            UsageError: there is no such file, or it holds something else.
        """
        path = Path(path).expanduser()
        content = read_secret(path, _FILE)
        if content is None:
            raise UsageError(
                f"there is no swarm key in {path}; make one with `swarmkit swarm-key create {path}`"
            )
        try:
            key = cls.from_bytes(content)
        except UsageError as error:
            raise UsageError(f"{path} is not a swarm key file: {error}") from None
        key._keep_revocations(path.with_name(f"{path.name}.revoked"))
        return key

    @classmethod
    def from_bytes(cls, content: bytes) -> SwarmKey:
        """Read what `to_bytes` wrote.

        Raises:
            UsageError: it is something else.
        """
        try:
            header, _, text = content.decode("ascii").strip().partition("\n")
            if header == _HEADER:
                return cls(binascii.unhexlify(text))
            if header != _OWNED_HEADER:
                raise ValueError("another header")
            lines = dict(line.split(" ", 1) for line in text.splitlines())
            seed = lines.get("identity")
            return cls(
                binascii.unhexlify(lines["secret"]),
                owner=lines["owner"],
                chain=read_chain(base64.b64decode(lines["certificates"], validate=True)),
                identity=Identity(binascii.unhexlify(seed)) if seed else None,
            )
        except (ValueError, KeyError, ProtocolError):
            raise UsageError(
                "make one with `swarmkit swarm-key create FILE`, or ask the owner of the swarm for one"
            ) from None

    def to_bytes(self) -> bytes:
        """The content of a file with this key."""
        if self.members is None:
            return f"{_HEADER}\n{self._secret.hex()}\n".encode()
        lines = [
            _OWNED_HEADER,
            f"secret {self._secret.hex()}",
            f"owner {self.members.owner}",
            f"certificates {base64.b64encode(self.members.shown).decode()}",
        ]
        if self.identity is not None:
            lines.append(f"identity {self.identity.seed.hex()}")
        return ("\n".join(lines) + "\n").encode()

    def for_member(self, chain: Chain, identity: Identity | None = None) -> SwarmKey:
        """The key of another member of the same swarm.

        Args: identity: the member's own, if it is to come with the key.

        Raises:
            UsageError: the swarm has no owner.
        """
        if self.members is None:
            raise UsageError(
                "this swarm has no owner, so that nobody signs certificates; make a key with "
                "`swarmkit swarm-key create FILE --owner IDENTITY_FILE`"
            )
        return SwarmKey(self._secret, owner=self.members.owner, chain=chain, identity=identity)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new file that only its owner may read.

        Raises:
            UsageError: there is such a file, or it cannot be written.
        """
        path = Path(path).expanduser()
        if path.exists():
            raise UsageError(f"{path} is there already; name another file, or delete it if it is unused")
        write_secret(path, self.to_bytes(), _FILE)

    def check_own(self, peer_id: str) -> None:
        """Refuse to begin as a peer that others would refuse; see `Members.check_own`."""
        if self.members is not None:
            self.members.check_own(peer_id)

    def _keep_revocations(self, path: Path) -> None:
        """Take up the list that was kept beside the key, and keep newer ones there."""
        members = self.members
        if members is None:
            return
        with contextlib.suppress(OSError):
            try:
                members.learn(path.read_bytes())
            except ProtocolError as error:
                logger.warning("%s is not believed: %s", path, error)

        def keep(signed: bytes) -> None:
            try:
                write_secret(path, signed, "list of revocations")
            except UsageError as error:
                logger.warning("%s; it is learnt from other peers at each start", error)

        members.on_news = keep

    def __repr__(self) -> str:
        return "<a swarm key>"

    def __reduce__(self) -> str:
        raise UsageError("a swarm key is not pickled; load it from its file where it is needed")

    def proof(self, role: str, name: str, opener: str, server: str, challenge: bytes) -> bytes:
        """Return a proof that the key is known to one end of a stream or request.

        Args:
            role: the end that proves it, "opener" or "server".
            name: of the stream or request.
            opener, server: the peer ids of the ends.
            challenge: fresh random bytes that the other end has chosen, perhaps with one's own.
        """
        said = b"".join(
            struct.pack(">I", len(part)) + part
            for part in (role.encode(), name.encode(), opener.encode(), server.encode(), challenge)
        )
        return hmac.digest(self._proofs, said, "sha256")

    def proves(self, proof: bytes, role: str, name: str, opener: str, server: str, challenge: bytes) -> bool:
        """Whether a proof is the one that `proof` makes of the same arguments."""
        return hmac.compare_digest(proof, self.proof(role, name, opener, server, challenge))

    # certificates

    @property
    def credentials(self) -> bytes:
        """This peer's certificates, sealed, to be shown to another peer; empty where there is no owner."""
        return self._credentials

    def fault_of(self, peer_id: str, credentials: bytes, needed: frozenset[Role] = frozenset()) -> str:
        """Why a peer that has the key and shows `credentials` may not go on; empty if it may.

        Args: needed: roles of which it needs one; none = any certificate will do.
        """
        if self.members is None:
            return ""
        try:
            self.members.admit(peer_id, self._opened_chain(credentials), needed)
        except NotAdmittedError as error:
            return str(error)
        return ""

    def _sealed_chain(self) -> bytes:
        assert self.members is not None
        nonce = secrets.token_bytes(_SEAL_NONCE_BYTES)
        return nonce + self._shown.encrypt(nonce, self.members.shown, None)

    def _opened_chain(self, credentials: bytes) -> bytes:
        """What was sealed; no chain at all if it was sealed with another key."""
        if not credentials or len(credentials) > MAX_CHAIN_BYTES + _SEAL_NONCE_BYTES + _TAG_BYTES:
            return b"-"
        nonce, rest = credentials[:_SEAL_NONCE_BYTES], credentials[_SEAL_NONCE_BYTES:]
        try:
            return self._shown.decrypt(nonce, rest, None)
        except (InvalidTag, ValueError):
            return b"-"

    # records

    def seal(self, subkey: str, value: bytes, expires_at: float) -> bytes:
        """Encrypt the value of a record, bound to the service that it is of and to its expiry.

        Where there is an owner, the certificates of this peer lie under the seal, too.
        """
        about = self._about_members + _about(subkey, expires_at)
        if self.members is not None:
            value = struct.pack(">H", len(self.members.shown)) + self.members.shown + value
        nonce = hmac.digest(self._nonces, struct.pack(">I", len(about)) + about + value, "sha256")
        nonce = nonce[:_SEAL_NONCE_BYTES]
        return nonce + self._records.encrypt(nonce, value, about)

    def unseal(self, subkey: str, sealed: bytes, expires_at: float) -> bytes | None:
        """Return what was given to `seal`; None if it was made without this key, or stands elsewhere, or its
        peer may not serve.
        """
        nonce, rest = sealed[:_SEAL_NONCE_BYTES], sealed[_SEAL_NONCE_BYTES:]
        try:
            value = self._records.decrypt(nonce, rest, self._about_members + _about(subkey, expires_at))
        except (InvalidTag, ValueError):
            return None
        if self.members is None:
            return value
        if len(value) < 2:
            return None
        end = 2 + int.from_bytes(value[:2], "big")
        if end > len(value) or self.members.fault_of(peer_of(subkey), value[2:end], _OF_RECORDS):
            return None
        return value[end:]

    def check_sealed(self, check: RecordCheck | None) -> RecordCheck:
        """Return a check for sealed records that passes what lies under their seal to `check`."""

        def checked(key: str, subkey: str, sealed: bytes, expires_at: float) -> bool:
            value = self.unseal(subkey, sealed, expires_at)
            return value is not None and (check is None or check(key, subkey, value, expires_at))

        return checked


async def admit_opener(key: SwarmKey, stream: Stream, name: str, own_id: str) -> None:
    """Let a stream that a peer has opened go on only if the peer has the key, and prove the same to it.

    Where there is an owner, the peer must also show that it may open streams of that name.

    Raises:
        NotAdmittedError: it has not, or may not, and was told so.
        PeerError: the stream has ended.
    """
    peer_id = stream.peer_id
    challenge = secrets.token_bytes(_NONCE_BYTES)
    await stream.send(_CHALLENGE, challenge)
    answer = await stream.receive()
    nonce, proof, credentials = _parts(answer, _NONCE_BYTES, _PROOF_BYTES)
    why = ""
    if not key.proves(proof, "opener", name, peer_id, own_id, challenge + nonce):
        why = _OTHER_KEY
        await stream.send(_REFUSAL)
    elif peer_id != own_id and (why := key.fault_of(peer_id, credentials, roles_of_opener(name))):
        await stream.send(_REFUSAL, why.encode())  # it has the key, so that it may know why
    if why:
        raise NotAdmittedError(f"peer {peer_id} was refused: {why}", peer_id)
    await stream.send(key.proof("server", name, peer_id, own_id, challenge + nonce), key.credentials)


async def prove_to_server(
    key: SwarmKey | None, first_frame: bytes, stream: Stream, name: str, own_id: str
) -> bool:
    """Prove to the peer that serves a stream that this one has the key, and have it prove the same.

    Where there is an owner, this peer shows its certificates, and the other one that it may serve.

    Args: first_frame: the first that the peer has sent.

    Returns: whether that frame was used up for it; False where neither end has a key.

    Raises:
        NotAdmittedError: one end has a key and the other one has not the same, or may not do this.
        PeerError: the stream has ended.
    """
    peer_id = stream.peer_id
    if not first_frame.startswith(_CHALLENGE):
        if key is not None:
            raise NotAdmittedError(f"no stream is opened to peer {peer_id}: {_OTHER_KEY}", peer_id)
        return False
    if key is None:
        raise NotAdmittedError(f"peer {peer_id} admits no stream of this peer: {PRIVATE}", peer_id)
    challenge = first_frame[len(_CHALLENGE) :] + secrets.token_bytes(_NONCE_BYTES)
    nonce = challenge[-_NONCE_BYTES:]
    await stream.send(nonce, key.proof("opener", name, own_id, peer_id, challenge), key.credentials)
    answer = await stream.receive()
    if answer.startswith(_REFUSAL):
        raise NotAdmittedError(f"peer {peer_id} admits no stream {refusal_text(answer)}", peer_id)
    proof, credentials, _ = _parts(answer, _PROOF_BYTES, len(answer))
    why = "" if key.proves(proof, "server", name, own_id, peer_id, challenge) else _OTHER_KEY
    if not why and peer_id != own_id:
        why = key.fault_of(peer_id, credentials, roles_of_server(name))
    if why:
        raise NotAdmittedError(f"no stream is opened to peer {peer_id}: {why}", peer_id)
    return True


def refusal_text(refusal: bytes) -> str:
    """What a peer says of its refusal, as printable text of bounded length."""
    said = refusal[len(_REFUSAL) :][:300].decode(errors="replace")
    said = "".join(letter for letter in said if letter.isprintable())
    return f"of this peer, and says: {said}" if said else "of this peer: the key of its swarm is another one"


def _parts(frame: bytes, first: int, second: int) -> tuple[bytes, bytes, bytes]:
    """A frame, cut after so many bytes, and after so many more."""
    return frame[:first], frame[first : first + second], frame[first + second :]


def _derived(secret: bytes, purpose: bytes) -> bytes:
    info = b"swarmkit swarm key 1: " + purpose
    return HKDF(algorithm=SHA256(), length=_SECRET_BYTES, salt=None, info=info).derive(secret)


def _about(subkey: str, expires_at: float) -> bytes:
    return struct.pack(">d", expires_at) + subkey.encode()
