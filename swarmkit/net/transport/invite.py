"""An invite link: one line that holds all that a peer needs to join a swarm.

::

    swarmkit:AQBn…        base64url, without padding, of

    1 byte    version of the link
    2 bytes   length of the body
    body      msgpack: addresses, expiry, key, model
    8 bytes   the first of SHA-256 over all before

So a link that was cut off, changed on its way, or made by a later version is told from one that is not a link
at all. Whoever has the link of a private swarm can join it, so it is passed on like a password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Annotated

import msgspec

from swarmkit.errors import UsageError
from swarmkit.net.transport.certificates import UnixTime
from swarmkit.net.transport.swarm_key import SwarmKey

PREFIX = "swarmkit:"
_VERSION = 1
_HEAD = struct.Struct(">BH")
_CHECK_BYTES = 8
_MOST_ADDRESSES = 16
_LONGEST_TEXT = 16_384

_Address = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^/[ -~]+$")]


class InviteLink(msgspec.Struct, frozen=True, array_like=True):
    """What a link says. Fields that a later version adds at the end are left out of account.

    Attributes:
        addresses: of peers of the swarm.
        expires_at: Unix time in seconds after which it is refused.
        key: the content of a swarm key file, of a private swarm; else empty.
        model: the model that the swarm is meant for, if any.
    """

    addresses: Annotated[tuple[_Address, ...], msgspec.Meta(min_length=1, max_length=_MOST_ADDRESSES)]
    expires_at: UnixTime
    key: Annotated[bytes, msgspec.Meta(max_length=6000)] = b""
    model: Annotated[str, msgspec.Meta(max_length=256)] = ""

    def swarm_key(self) -> SwarmKey | None:
        """The key of a private swarm; None where the swarm is open.

        Raises:
            UsageError: the link holds something else.
        """
        return SwarmKey.from_bytes(self.key) if self.key else None


_decoder = msgspec.msgpack.Decoder(InviteLink)


def is_link(text: str) -> bool:
    """Whether something that was given as an address is meant as a link."""
    return text.strip().lower().startswith(PREFIX)


def write_link(link: InviteLink) -> str:
    """The link as one line of text.

    Raises:
        UsageError: there is no address, or too many, or one that is none.
    """
    body = msgspec.msgpack.encode(link)
    try:
        _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise UsageError(f"no link can be made of this: {error}") from None
    data = _HEAD.pack(_VERSION, len(body)) + body
    data += hashlib.sha256(data).digest()[:_CHECK_BYTES]
    return PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")


def read_link(text: str, now: float) -> InviteLink:
    """What a link says.

    Args: now: Unix time, seconds.

    Raises:
        UsageError: it is damaged, cut off, of a later version, or has expired.
    """
    letters = "".join(text.split())[len(PREFIX) :]
    if len(letters) > _LONGEST_TEXT:
        raise _unusable("is longer than any link")
    letters = letters.rstrip("=")
    whole = letters[: len(letters) - (len(letters) % 4 == 1)]  # one letter over is half a byte of a cut link
    try:
        data = base64.b64decode(whole + "=" * (-len(whole) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _unusable("is damaged: it holds letters that no link has") from None
    if len(data) < _HEAD.size:
        raise _unusable("is cut off")
    version, length = _HEAD.unpack_from(data)
    due = _HEAD.size + length + _CHECK_BYTES
    if len(data) < due:
        raise _unusable(f"is cut off, or damaged: {len(data)} of {due} bytes are there")
    checked = data[: _HEAD.size + length]
    if len(data) > due or hashlib.sha256(checked).digest()[:_CHECK_BYTES] != data[len(checked) :]:
        raise _unusable("is damaged: its checksum differs")
    if version != _VERSION:
        raise UsageError(
            f"the invite link is of version {version}, and this swarmkit reads version {_VERSION}: "
            f"{'update swarmkit' if version > _VERSION else 'ask for a new link'}"
        )
    try:
        link = _decoder.decode(data[_HEAD.size : _HEAD.size + length])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise _unusable(f"holds something else than a link does ({error})") from None
    if not now < link.expires_at:
        date = datetime.fromtimestamp(link.expires_at, timezone.utc)
        raise UsageError(f"the invite link has expired, on {date:%Y-%m-%d at %H:%M} UTC; ask for a new one")
    return link


def joined_links(given: Sequence[str], now: float) -> tuple[list[str], SwarmKey | None]:
    """Addresses, where some of those given are links; and the key that came with a link, if one did.

    Raises:
        UsageError: a link cannot be used, or two of them are of different swarms.
    """
    addresses: list[str] = []
    keys: list[SwarmKey] = []
    for text in given:
        if not is_link(text):
            addresses.append(text)
            continue
        link = read_link(text, now)
        addresses.extend(link.addresses)
        if (key := link.swarm_key()) is not None:
            keys.append(key)
    if len({key.swarm for key in keys}) > 1:
        raise UsageError("the invite links are of different private swarms; give those of one")
    return list(dict.fromkeys(addresses)), (keys[0] if keys else None)


def _unusable(why: str) -> UsageError:
    return UsageError(f"the invite link {why}; copy it again as a whole, or ask for a new one")
