"""What a server tells the swarm about itself: a signed, dated record under one key per block.

A record is trusted no further than its signature: the signer is the peer that it names, so no peer can speak
for another one, but everything else in it (throughput, free cache) is a claim. A peer has one announcement
for each service that it runs: it may serve two models, or two runs of one model's blocks.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from swarmkit.errors import ProtocolError
from swarmkit.net.protocol.messages import (
    PRINTABLE,
    Addresses,
    Age,
    BlockIndex,
    Count,
    Fingerprint,
    Millis,
    Seconds,
    ServiceNumber,
    ShortText,
)
from swarmkit.net.registry.envelope import Envelope, check_expiry
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.seam import service_id

RECORD_VERSION = 1
MODELS_KEY = "swarmkit/1/models"

PREFIX = "swarmkit/1/blocks/"
"""What the keys of announcements begin with, but for `MODELS_KEY`."""

ServerState = Literal["joining", "online", "leaving"]
ProtocolVersion = Annotated[int, msgspec.Meta(ge=1, le=255)]
Rate = Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]


class HostedAdapter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An adapter that a server offers to every client: its name for people, and its hash."""

    label: Annotated[str, msgspec.Meta(max_length=96, pattern=PRINTABLE)]
    name: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


MAX_HOSTED_ADAPTERS = 8


class MeasuredLink(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The way from a server to one that it hands outputs on to: a round trip, seen `age_s` seconds ago."""

    service_id: ShortText
    round_trip_s: Seconds
    age_s: Age


MAX_LINKS = 4


class Announcement(msgspec.Struct, frozen=True, kw_only=True):
    """One server's word about itself.

    Attributes:
        service: tells this server from others of the same peer; its endpoints have the number in their names.
        fingerprint: of config and weights; servers of different models never meet in one route.
        model: the model's name as its owner wrote it, for people.
        num_blocks: blocks of the whole model.
        start, stop: the blocks it serves, [start, stop).
        throughput: measured decode steps (tokens) per second through all its blocks.
        forward_rate: tokens per second of long passes through all its blocks; 0 = not measured.
        measured_age_s: for how many seconds these two had not been measured when it said so.
        expected_wait_s: how long a step of one token would have waited.
        links: to servers that it hands outputs on to.
        free_cache_tokens: tokens of one row that its cache can still take.
        dtype: what it computes in.
        adapters: those that it hosts.
        head_ms: how long it takes to compute the output layer of one token for a client; 0 = it does not.
        kv_bytes: of keys and values of one token in one block, which it takes from a server that leaves, and
            hands over when it leaves itself; 0 = it does not.
        moving_to: blocks [start, stop) that it means to serve instead of these.
        sequence: grows with every announcement of a service; the greatest one counts.
        protocols: the oldest and the newest protocol version that it speaks.
        expires_at: Unix time, seconds.

    Fields that a later version adds are left out of account.
    """

    peer_id: ShortText
    fingerprint: Fingerprint
    model: Annotated[str, msgspec.Meta(max_length=256, pattern=PRINTABLE)]
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    start: BlockIndex
    stop: BlockIndex
    state: ServerState
    throughput: Rate
    free_cache_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    dtype: Annotated[str, msgspec.Meta(max_length=16, pattern=PRINTABLE)]
    addresses: Addresses
    public_name: Annotated[str, msgspec.Meta(max_length=64, pattern=PRINTABLE)] = ""
    software: ShortText = ""
    service: ServiceNumber = 0
    protocols: tuple[ProtocolVersion, ProtocolVersion] = (2, 2)
    adapters: Annotated[tuple[HostedAdapter, ...], msgspec.Meta(max_length=MAX_HOSTED_ADAPTERS)] = ()
    forward_rate: Rate = 0.0
    measured_age_s: Age = 0.0
    expected_wait_s: Seconds = 0.0
    links: Annotated[tuple[MeasuredLink, ...], msgspec.Meta(max_length=MAX_LINKS)] = ()
    head_ms: Millis = 0.0
    kv_bytes: Count = 0
    moving_to: tuple[BlockIndex, BlockIndex] | None = None
    sequence: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    expires_at: float

    @property
    def service_id(self) -> str:
        """The name of the server in the whole swarm: its peer and its number there."""
        return service_id(self.peer_id, self.service)

    @property
    def label(self) -> str:
        """How people see this server: its public name, or the end of its peer id."""
        return self.public_name or self.peer_id[-6:]


_envelope = Envelope(Announcement, b"swarmkit announcement 1\n", "an announcement")


def block_key(fingerprint: str, block: int) -> str:
    """The shared table's key for the servers of one block."""
    return f"{PREFIX}{fingerprint}/{block}"


def keys_of(announcement: Announcement) -> list[str]:
    """Every key under which an announcement belongs: one per block, and the index of models."""
    blocks = range(announcement.start, announcement.stop)
    return [*(block_key(announcement.fingerprint, block) for block in blocks), MODELS_KEY]


def sign(announcement: Announcement, identity: Identity) -> bytes:
    """The record that other peers will believe."""
    return _envelope.sign(announcement, identity)


def read(
    key: str, subkey: str, value: bytes, now: float, known: dict[bytes, Announcement] | None = None
) -> Announcement:
    """The announcement in a record that was found at `key`, `subkey`.

    Args:
        now: Unix time, seconds.
        known: records whose signature was checked before; read and added to.

    Raises:
        ProtocolError: too large, malformed, unsigned, signed by another peer, stored where it does not
            belong, expired, or dated too far ahead.
    """
    announcement = known.get(value) if known is not None else None
    if announcement is None:
        announcement = _verified(value, subkey)
        if known is not None:
            known[value] = announcement
    if announcement.service_id != subkey:
        raise ProtocolError("a record stands under a service that did not sign it", subkey)
    if key != MODELS_KEY:
        prefix, _, block = key.rpartition("/")
        if prefix != f"{PREFIX}{announcement.fingerprint}":
            raise ProtocolError("a record stands under a model that it does not serve", subkey)
        if block not in map(str, range(announcement.start, announcement.stop)):
            raise ProtocolError("a record stands under a block that it does not serve", subkey)
    check_expiry(announcement.expires_at, now, subkey)
    return announcement


def _verified(value: bytes, subkey: str) -> Announcement:
    announcement = _envelope.read(value, subkey)
    if not announcement.start < announcement.stop <= announcement.num_blocks:
        raise ProtocolError("the record's block range is not inside its model", announcement.peer_id)
    low, high = announcement.moving_to or (0, 1)
    if not low < high <= announcement.num_blocks:
        raise ProtocolError("the record's next blocks are not inside its model", announcement.peer_id)
    numbers = announcement.throughput, announcement.forward_rate, announcement.expires_at
    if not all(map(math.isfinite, numbers)):
        raise ProtocolError("the record's numbers are not finite", announcement.peer_id)
    return announcement
