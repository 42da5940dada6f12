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

Proofs are HMAC-SHA256 (RFC 2104) under keys that HKDF (RFC 5869) derives from the secret. Records are sealed
with AES-256-GCM, whose nonce is an HMAC of what is sealed: equal records of one service have equal seals, so
that a record under many keys is verified once.
"""

from __future__ import annotations

import binascii
import hmac
import os
import secrets
import struct
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from swarmkit.errors import NotAdmittedError, UsageError
from swarmkit.net.transport.seam import RecordCheck, Stream
from swarmkit.net.transport.secret_file import read_secret, write_secret

_FILE = "swarm key file"
_HEADER = "swarmkit swarm key 1"
_SECRET_BYTES = 32
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_SEAL_NONCE_BYTES = 12

_CHALLENGE = b"swarm key 1\n"
"""How the first frame begins that a server with a key sends."""
_REFUSAL = b"refused\n"
PRIVATE = "its swarm is private: give the swarm's key, with --swarm-key FILE or swarm_key="
_OTHER_KEY = "it does not have the key of this swarm"


class SwarmKey:
    """The key of a private swarm. It is never shown and never sent."""

    def __init__(self, secret: bytes | None = None) -> None:
        """Args: secret: 32 secret bytes; fresh random ones if not given."""
        secret = secrets.token_bytes(_SECRET_BYTES) if secret is None else secret
        if len(secret) != _SECRET_BYTES:
            raise UsageError(f"a swarm key is made of {_SECRET_BYTES} secret bytes, not {len(secret)}")
        self._secret = secret
        self._proofs = _derived(secret, b"proofs")
        self._nonces = _derived(secret, b"nonces of records")
        self._records = AESGCM(_derived(secret, b"records"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SwarmKey:
        """Read a key that `save` wrote.

        Raises:
            UsageError: there is no such file, or it holds something else.
        """
        path = Path(path).expanduser()
        content = read_secret(path, _FILE)
        if content is None:
            raise UsageError(f"there is no swarm key in {path}; make one with `swarmkit swarm-key {path}`")
        try:
            header, _, text = content.decode("ascii").strip().partition("\n")
            if header != _HEADER:
                raise ValueError("another header")
            return cls(binascii.unhexlify(text))
        except ValueError:
            raise UsageError(
                f"{path} is not a swarm key file; make one with `swarmkit swarm-key FILE`, and copy it to "
                "all peers of the swarm"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new file that only its owner may read.

        Raises:
            UsageError: there is such a file, or it cannot be written.
        """
        path = Path(path).expanduser()
        if path.exists():
            raise UsageError(f"{path} is there already; name another file, or delete it if it is unused")
        write_secret(path, f"{_HEADER}\n{self._secret.hex()}\n".encode(), _FILE)

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

    # records

    def seal(self, subkey: str, value: bytes, expires_at: float) -> bytes:
        """Encrypt the value of a record, bound to the service that it is of and to its expiry."""
        about = _about(subkey, expires_at)
        nonce = hmac.digest(self._nonces, struct.pack(">I", len(about)) + about + value, "sha256")
        nonce = nonce[:_SEAL_NONCE_BYTES]
        return nonce + self._records.encrypt(nonce, value, about)

    def unseal(self, subkey: str, sealed: bytes, expires_at: float) -> bytes | None:
        """Return what was given to `seal`; None if it was made without this key, or stands elsewhere."""
        nonce, rest = sealed[:_SEAL_NONCE_BYTES], sealed[_SEAL_NONCE_BYTES:]
        try:
            return self._records.decrypt(nonce, rest, _about(subkey, expires_at))
        except (InvalidTag, ValueError):
            return None

    def check_sealed(self, check: RecordCheck | None) -> RecordCheck:
        """Return a check for sealed records that passes what lies under their seal to `check`."""

        def checked(key: str, subkey: str, sealed: bytes, expires_at: float) -> bool:
            value = self.unseal(subkey, sealed, expires_at)
            return value is not None and (check is None or check(key, subkey, value, expires_at))

        return checked


async def admit_opener(key: SwarmKey, stream: Stream, name: str, own_id: str) -> None:
    """Let a stream that a peer has opened go on only if the peer has the key, and prove the same to it.

    Raises:
        NotAdmittedError: it has not, and was told so.
        PeerError: the stream has ended.
    """
    challenge = secrets.token_bytes(_NONCE_BYTES)
    await stream.send(_CHALLENGE, challenge)
    answer = await stream.receive()
    nonce, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not key.proves(proof, "opener", name, stream.peer_id, own_id, challenge + nonce):
        await stream.send(_REFUSAL)
        raise NotAdmittedError(f"peer {stream.peer_id} was refused: {_OTHER_KEY}", stream.peer_id)
    await stream.send(key.proof("server", name, stream.peer_id, own_id, challenge + nonce))


async def prove_to_server(
    key: SwarmKey | None, first_frame: bytes, stream: Stream, name: str, own_id: str
) -> bool:
    """Prove to the peer that serves a stream that this one has the key, and have it prove the same.

    Args: first_frame: the first that the peer has sent.

    Returns: whether that frame was used up for it; False where neither end has a key.

    Raises:
        NotAdmittedError: one end has a key and the other one has not the same.
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
    await stream.send(nonce, key.proof("opener", name, own_id, peer_id, challenge))
    answer = await stream.receive()
    if answer == _REFUSAL:
        raise NotAdmittedError(
            f"peer {peer_id} admits no stream of this peer: the key of its swarm is another one", peer_id
        )
    if not key.proves(answer, "server", name, own_id, peer_id, challenge):
        raise NotAdmittedError(f"no stream is opened to peer {peer_id}: {_OTHER_KEY}", peer_id)
    return True


def _derived(secret: bytes, purpose: bytes) -> bytes:
    info = b"swarmkit swarm key 1: " + purpose
    return HKDF(algorithm=SHA256(), length=_SECRET_BYTES, salt=None, info=info).derive(secret)


def _about(subkey: str, expires_at: float) -> bytes:
    return struct.pack(">d", expires_at) + subkey.encode()
