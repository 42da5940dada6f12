"""A peer's name is its public key: Ed25519 keys and libp2p peer ids.

The private key file has libp2p's own format (a protobuf of key type and bytes), so that the p2p daemon can
authenticate its connections with the very key that signs our records, and a record can be tied to a peer
without asking another peer. Peer id of an Ed25519 key: base58btc(identity multihash of the protobuf public
key), as in the libp2p peer-id specification.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarmkit.errors import UsageError
from swarmkit.net.transport.secret_file import read_secret, write_secret

# protobuf: field 1 (key type, varint) = 1 (Ed25519); field 2 (key bytes, length-delimited) of 32 or 64 bytes
_PUBLIC_PREFIX = bytes([0x08, 0x01, 0x12, 32])
_PRIVATE_PREFIX = bytes([0x08, 0x01, 0x12, 64])
# multihash: code 0x00 (identity), length 36
_MULTIHASH_PREFIX = bytes([0x00, 36])

_FILE = "identity file"


class Identity:
    """A key pair that signs as one peer."""

    def __init__(self, seed: bytes | None = None) -> None:
        """Args: seed: 32 secret bytes; fresh random ones if not given."""
        if seed is not None and len(seed) != 32:
            raise UsageError(f"an identity is made from 32 secret bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed) if seed else Ed25519PrivateKey.generate()
        self._public = self._key.public_key().public_bytes_raw()
        self.peer_id: str = _peer_id_of(self._public)

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes that the identity is made from."""
        return self._key.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """A 64-byte signature of `data`."""
        return self._key.sign(data)

    def to_bytes(self) -> bytes:
        """The private key in libp2p's file format."""
        return _PRIVATE_PREFIX + self._key.private_bytes_raw() + self._public

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """Read libp2p's file format.

        Raises:
            UsageError: not an Ed25519 private key in that format.
        """
        if len(data) != len(_PRIVATE_PREFIX) + 64 or not data.startswith(_PRIVATE_PREFIX):
            raise UsageError("not an Ed25519 identity file; delete it to have a new one made")
        return cls(data[len(_PRIVATE_PREFIX) :][:32])

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Read the identity at `path`, or make one and write it there, readable by its owner only.

        Raises:
            UsageError: the file cannot be read or written, or holds something else.
        """
        path = path.expanduser()
        content = read_secret(path, _FILE)
        if content is not None:
            return cls.from_bytes(content)
        identity = cls()
        write_secret(path, identity.to_bytes(), _FILE)
        return identity


def verify(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is what the holder of `peer_id` signs `data` with. Never raises."""
    public = _public_key_of(peer_id)
    if public is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def is_peer_id(text: str) -> bool:
    """Whether a text is the id of an Ed25519 key."""
    return _public_key_of(text) is not None


@dataclass
class VerifiedSignatures:
    """Remembers which signatures were verified, by hashes, so that large records are not kept for it."""

    most: int = 16_384
    _known: OrderedDict[bytes, bool] = field(default_factory=OrderedDict, repr=False)

    def verify(self, peer_id: str, data: bytes, signature: bytes) -> bool:
        """What `verify` says of the same arguments, which is computed once."""
        digest = hashlib.sha256()
        for part in (peer_id.encode(), signature, data):
            digest.update(len(part).to_bytes(8, "big") + part)
        name = digest.digest()
        if name not in self._known:
            self._known[name] = verify(peer_id, data, signature)
            if len(self._known) > self.most:
                self._known.popitem(last=False)
        return self._known[name]


def _peer_id_of(public: bytes) -> str:
    return base58.b58encode(_MULTIHASH_PREFIX + _PUBLIC_PREFIX + public).decode()


def _public_key_of(peer_id: str) -> bytes | None:
    """The 32 key bytes inside a peer id, or None if it is not the id of an Ed25519 key."""
    if len(peer_id) > 64:
        return None
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        return None
    prefix = _MULTIHASH_PREFIX + _PUBLIC_PREFIX
    if len(raw) != len(prefix) + 32 or not raw.startswith(prefix):
        return None
    return raw[len(prefix) :]
