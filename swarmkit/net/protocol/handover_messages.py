"""How keys and values of a running session go from a server that leaves to the one that takes its place.

The session's client decides: it has a session at the new server, asks that one to await the keys and values,
and then asks the old one to hand them over. They go straight from server to server::

    client                         new server                 old server
      │ AwaitKeys ──────────────────> │                            │
      │ <────────────── KeysAwaited   │                            │
      │ HandOver ───────────────────────────────────────────────>  │
      │                               │ <──────────── BringKeys    │
      │                               │ KeysWelcome ────────────>  │
      │                               │ <── BroughtKeys, one       │
      │                               │     for each piece         │
      │                               │ KeysTaken ──────────────>  │
      │ <──────────────────────────────────────────── HandedOver   │
      │ GetKeysTaken ───────────────> │                            │
      │ <──────────────── KeysTaken   │                            │

=============  ============================  ==========================================
state          the opener may send           the server answers with
=============  ============================  ==========================================
`idle`         `AwaitKeys` -> `awaiting`     `KeysAwaited`, or `Fault`
`awaiting`     `GetKeysTaken`                `KeysTaken`
`idle`         `HandOver` -> `idle`          `HandedOver`, or `Fault`
`idle`         `BringKeys` -> `bringing`     `KeysWelcome`, or `Fault`
`bringing`     `BroughtKeys` -> `bringing`   `KeysTaken` to the last of them, or `Fault`
any            (end of stream)               nothing is awaited, handed over or taken any more
=============  ============================  ==========================================

On streams of the protocol `HANDOVER`. A server that does this says so in its announcement (`kv_bytes`), so
that peers which do not know the protocol are never asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import (
    BlockIndex,
    Count,
    Fault,
    ServiceNumber,
    ShortText,
    Total,
    _Message,
)
from swarmkit.net.protocol.protocol import Protocol

PIECE_BYTES = 4 * 1024 * 1024
"""Keys and values of one message at most: so much of them is copied, sent and checked at a time."""

Secret = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Rows = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class AwaitKeys(_Message, frozen=True):
    """Let a session that has done nothing yet begin with keys and values that another server brings.

    Attributes:
        session: the inlet of the client's session here.
        rows, tokens: that will be held; all of them, or none.
        sender: the peer that may bring them.
    """

    session: Secret
    rows: Rows
    tokens: Tokens
    sender: ShortText


class KeysAwaited(_Message, frozen=True):
    """They may come, as long as this stream lasts, from the peer that knows the ticket."""

    ticket: Secret


class GetKeysTaken(_Message, frozen=True):
    """Ask whether they have come."""


class KeysTaken(_Message, frozen=True):
    """The session holds that many tokens which were brought to it; 0 = they have not all come."""

    tokens: Count


class HandOver(_Message, frozen=True):
    """Bring the keys and values of the first `tokens` of a session of this client to a peer's service.

    The server dials the addresses that the peer has announced.

    Attributes:
        session: the inlet of the client's session here.
    """

    session: Secret
    rows: Rows
    tokens: Tokens
    peer_id: ShortText
    service: ServiceNumber
    ticket: Secret


class HandedOver(_Message, frozen=True):
    """The peer says that it has taken all of them, which were `nbytes` bytes."""

    nbytes: Total


class BringKeys(_Message, frozen=True):
    """The keys and values on this stream are for the session that awaits them under this ticket."""

    ticket: Secret


class KeysWelcome(_Message, frozen=True):
    """They may come."""


class BroughtKeys(_Message, frozen=True):
    """Keys and values of some tokens from `position` on, in one block, in the order of `key_pieces`.

    Attributes:
        block: counted in the whole model.
        keys, values: [rows, heads, tokens, dim], as the blocks compute them.
    """

    block: BlockIndex
    position: Count
    keys: TensorSpec
    values: TensorSpec


HandoverMessage = (
    AwaitKeys
    | KeysAwaited
    | GetKeysTaken
    | KeysTaken
    | HandOver
    | HandedOver
    | BringKeys
    | KeysWelcome
    | BroughtKeys
    | Fault
)
HANDOVER = Protocol(
    "handover",
    HandoverMessage,
    legal={
        "idle": {AwaitKeys: "awaiting", HandOver: "idle", BringKeys: "bringing"},
        "awaiting": {GetKeysTaken: "awaiting"},
        "bringing": {BroughtKeys: "bringing"},
    },
    first="idle",
)


@dataclass(frozen=True)
class KeysPiece:
    """Tokens [low, high) of block number `block` of a session's own."""

    block: int
    low: int
    high: int


def key_pieces(token_bytes: Sequence[int], tokens: int) -> list[KeysPiece]:
    """In which pieces the keys and values of `tokens` go, block by block. Pure; both ends know it.

    Args: token_bytes: of one token of all rows, for each of the session's blocks.
    """
    pieces = []
    for block, nbytes in enumerate(token_bytes):
        most = max(1, PIECE_BYTES // max(nbytes, 1))
        pieces += [KeysPiece(block, low, min(low + most, tokens)) for low in range(0, tokens, most)]
    return pieces
