"""How a server gets a block's file from another one: it asks by content hash, on a stream of its own.

=============  =======================  ===========================================
state          the asking server sends  the other one answers with
=============  =======================  ===========================================
`idle`         `GetFile` -> `idle`      `FileFound` and then `FileChunk` until its end, or `Fault`
any            (end of stream)          the transfer ends
=============  =======================  ===========================================

On a stream of the protocol `WEIGHTS`. Only what was offered is sent.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import Fault, Total, _Message
from swarmkit.net.protocol.protocol import Protocol

ContentHash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""SHA-256 of a file."""


class GetFile(_Message, frozen=True):
    """Send a file from byte `offset` on."""

    content: ContentHash
    offset: Total = 0


class FileFound(_Message, frozen=True):
    """The file has `size` bytes; those from the asked offset on follow."""

    size: Total


class FileChunk(_Message, frozen=True):
    """The next bytes of the file, as a tensor of uint8, [bytes]."""

    data: TensorSpec


WEIGHTS = Protocol(
    "weights", GetFile | FileFound | FileChunk | Fault, legal={"idle": {GetFile: "idle"}}, first="idle"
)
