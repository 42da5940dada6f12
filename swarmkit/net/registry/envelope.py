"""What makes a record a peer's word: its body, and a signature over it by the peer that it names."""

from __future__ import annotations

import math
from typing import Generic, Protocol, TypeVar

import msgspec

from swarmkit.errors import ProtocolError
from swarmkit.net.transport.identity import Identity, VerifiedSignatures
from swarmkit.net.transport.limits import MAX_LIFETIME_S

MAX_RECORD_BYTES = 4096


class Statement(Protocol):
    """The body of a record: a msgspec struct that says whose word it is."""

    @property
    def peer_id(self) -> str: ...


Body = TypeVar("Body", bound=Statement)


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    body: bytes
    signature: bytes


_encoder = msgspec.msgpack.Encoder()
_signed_decoder = msgspec.msgpack.Decoder(_Signed)


def check_expiry(expires_at: float, now: float, sender: str) -> None:
    """Refuse a record that is of no use any more, or claims to be for too long.

    Raises:
        ProtocolError: it has expired at `now` (Unix time, seconds), or expires too far ahead.
    """
    if not (math.isfinite(expires_at) and now < expires_at):
        raise ProtocolError("the record has expired", sender)
    if expires_at > now + MAX_LIFETIME_S:
        raise ProtocolError("the record is dated too far ahead; check both clocks", sender)


class Envelope(Generic[Body]):
    """Signs and reads the records of one kind.

    Args:
        kind: the struct of the body.
        context: signed with the body, so that no record passes for one of another kind.
        name: what error messages call it, as in "an announcement".
    """

    def __init__(self, kind: type[Body], context: bytes, name: str) -> None:
        self._context = context
        self._name = name
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._verify = VerifiedSignatures().verify

    def sign(self, body: Body, identity: Identity) -> bytes:
        """The record that other peers will believe to be this one's word."""
        encoded = _encoder.encode(body)
        return _encoder.encode(_Signed(encoded, identity.sign(self._context + encoded)))

    def read(self, value: bytes, sender: str = "") -> Body:
        """The body of a record.

        Args:
            sender: whose fault it is if nothing can be read.

        Raises:
            ProtocolError: too large, malformed, or not signed by the peer that it names.
        """
        if len(value) > MAX_RECORD_BYTES:
            raise ProtocolError(f"a record of {len(value)} bytes is larger than {MAX_RECORD_BYTES}", sender)
        try:
            signed = _signed_decoder.decode(value)
            body = self._decoder.decode(signed.body)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not {self._name}: {error}", sender) from None
        if not self._verify(body.peer_id, self._context + signed.body, signed.signature):
            raise ProtocolError(f"the signature under {self._name} is not its peer's", body.peer_id)
        return body
