"""Which peers hold which block's file, or a model's manifest: signed, dated records beside the announcements.

An offer says two things at once: that its peer hands out the file with a certain content hash, and that this
file is a certain block of a certain model, or its manifest. It stands under a key for each::

    swarmkit/1/weights/<content hash>              which peers hold these bytes
    swarmkit/1/weights/<fingerprint>/<block>       what peers say the bytes of the block are
    swarmkit/1/weights/<fingerprint>/manifest      what peers say the bytes of the manifest are

The first can be checked by the peer that fetches the file, and the last too (a manifest is what a
fingerprint is a hash of). What a block is, is a claim, and believed only where the block's hash is known: see
`swarmkit/server/weights/fetch.py`.
"""

from __future__ import annotations

import msgspec

from swarmkit.errors import ProtocolError
from swarmkit.net.protocol.messages import Addresses, BlockIndex, Fingerprint, ShortText, Total
from swarmkit.net.protocol.weights_messages import ContentHash
from swarmkit.net.registry.envelope import Envelope, check_expiry
from swarmkit.net.transport.identity import Identity

PREFIX = "swarmkit/1/weights/"


class WeightsOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One peer's offer of one file.

    Attributes:
        fingerprint, block: what the peer says the file is; without a block it is the model's manifest.
        content: SHA-256 of the file.
        size: of the file, in bytes.
        addresses: where the peer can be dialled.
        expires_at: Unix time, seconds.
    """

    peer_id: ShortText
    fingerprint: Fingerprint
    block: BlockIndex | None
    content: ContentHash
    size: Total
    addresses: Addresses
    expires_at: float


_envelope = Envelope(WeightsOffer, b"swarmkit weights offer 1\n", "an offer of weights")


def claim_key(fingerprint: str, block: int | None) -> str:
    """The shared table's key for what peers say a block is, or the manifest."""
    return f"{PREFIX}{fingerprint}/{'manifest' if block is None else block}"


def content_key(content: str) -> str:
    """The shared table's key for the holders of a file."""
    return f"{PREFIX}{content}"


def keys_of(offer: WeightsOffer) -> list[str]:
    """Every key under which an offer belongs."""
    return [claim_key(offer.fingerprint, offer.block), content_key(offer.content)]


def sign(offer: WeightsOffer, identity: Identity) -> bytes:
    """The record that other peers will believe to be this one's word."""
    return _envelope.sign(offer, identity)


def read(key: str, subkey: str, value: bytes, now: float) -> WeightsOffer:
    """The offer in a record that was found at `key`, `subkey`.

    Raises:
        ProtocolError: too large, malformed, unsigned, signed by another peer, stored where it does not
            belong, expired, or dated too far ahead.
    """
    offer = _envelope.read(value, subkey)
    if offer.peer_id != subkey:
        raise ProtocolError("an offer stands under a peer that did not sign it", subkey)
    if key not in keys_of(offer):
        raise ProtocolError("an offer stands under a key that is not its own", subkey)
    check_expiry(offer.expires_at, now, subkey)
    return offer
