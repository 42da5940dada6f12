"""How an adapter comes to a server: a message with its form and its values, on a stream of its own.

=============  =======================  ===========================================
state          the client may send      the server answers with
=============  =======================  ===========================================
`idle`         `PutAdapter` -> `idle`   `AdapterKept`, or `Fault`
any            (end of stream)          nothing; what is kept is kept
=============  =======================  ===========================================

On a stream of `ADAPTER_ENDPOINT`. An adapter is named by a hash of all that it is, so that whoever says the
name means the same; sessions and requests for training name it, and are refused with `no_adapter` where it is
not kept (any more). It is kept for as long as there is room (least recently used ones go first), and for all
the time that a session has it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from swarmkit.errors import IllegalMessageError
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import (
    PROTOCOL_VERSION,
    AdapterName,
    BlockIndex,
    Fault,
    Fingerprint,
    _Message,
)

ADAPTER_ENDPOINT = f"swarmkit/{PROTOCOL_VERSION}/adapters"
MAX_PARTS = 1500
"""Linear layers that one adapter changes: more would not fit into a header."""

ModuleName = Annotated[str, msgspec.Meta(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9_.]+\Z")]
LoraPart = tuple[
    BlockIndex,
    ModuleName,
    Annotated[int, msgspec.Meta(ge=1, le=65536)],
    Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)],  # which NaN is not
]
"""Block, linear layer inside it, rank, and the factor of what A and B add."""


class PutAdapter(_Message, frozen=True):
    """Keep an adapter for blocks [start, stop) of a model, if there is room.

    Attributes:
        lora: sorted by block and module.
        prompt_tokens: how many deep prompts there are for each block.
        values: [numel], block by block: A [rank, in] and B [out, rank] of each part, then the prompts.
        name: its hash; see `models.adapters.digest_of`.
    """

    fingerprint: Fingerprint
    start: BlockIndex
    stop: BlockIndex
    lora: Annotated[tuple[LoraPart, ...], msgspec.Meta(max_length=MAX_PARTS)]
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    values: TensorSpec
    name: AdapterName


class AdapterKept(_Message, frozen=True):
    """It is kept; sessions and requests may name it."""

    name: AdapterName


AdapterMessage = PutAdapter | AdapterKept | Fault
AdapterState = Literal["idle"]
LEGAL: dict[AdapterState, dict[type, AdapterState]] = {"idle": {PutAdapter: "idle"}}

decoder: msgspec.msgpack.Decoder[AdapterMessage] = msgspec.msgpack.Decoder(AdapterMessage)  # type: ignore[arg-type]
"""For a `Conversation` on a stream of `ADAPTER_ENDPOINT`."""


def next_state(state: AdapterState, message: object) -> AdapterState:
    """The server's state after a message from a client.

    Raises:
        IllegalMessageError: the message is not legal in `state`.
    """
    try:
        return LEGAL[state][type(message)]
    except KeyError:
        legal = ", ".join(kind.__name__ for kind in LEGAL[state])
        raise IllegalMessageError(
            f"a peer may not send {type(message).__name__} in state '{state}'; legal here: {legal}"
        ) from None
