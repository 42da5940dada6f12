"""How an adapter comes to a server: a message with its form and its values, on a stream of its own.

=============  =======================  ===========================================
state          the client may send      the server answers with
=============  =======================  ===========================================
`idle`         `PutAdapter` -> `idle`   `AdapterKept`, or `Fault`
any            (end of stream)          nothing; what is kept is kept
=============  =======================  ===========================================

On a stream of the protocol `ADAPTER`. An adapter is named by a hash of all that it is, so that the name means
the same everywhere; sessions and requests for training name it, and are refused with `no_adapter` where it is
not kept (any more). It is kept for as long as there is room (least recently used ones go first), and for all
the time that a session has it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import (
    AdapterName,
    BlockIndex,
    Fault,
    Fingerprint,
    _Message,
)
from swarmkit.net.protocol.protocol import Protocol

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
        prompt_rows: rows of a batch that have deep prompts of their own; 0 = all have the same.
        values: [numel], block by block: A [rank, in] and B [out, rank] of each part, then the prompts
            [prompt_tokens, hidden], or [prompt_rows, prompt_tokens, hidden].
        name: its hash; see `models.adapters.digest_of`.
    """

    fingerprint: Fingerprint
    start: BlockIndex
    stop: BlockIndex
    lora: Annotated[tuple[LoraPart, ...], msgspec.Meta(max_length=MAX_PARTS)]
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    values: TensorSpec
    name: AdapterName
    prompt_rows: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0


class AdapterKept(_Message, frozen=True):
    """It is kept; sessions and requests may name it."""

    name: AdapterName


AdapterMessage = PutAdapter | AdapterKept | Fault
ADAPTER = Protocol("adapters", AdapterMessage, legal={"idle": {PutAdapter: "idle"}}, first="idle")
