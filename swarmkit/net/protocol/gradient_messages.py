"""What a client says to a server for training: whole sequences forward, and gradients back.

=============  =======================  ===========================================
state          the client may send      the server answers with
=============  =======================  ===========================================
`idle`         `Forward`  -> `idle`     `Working` (any number), then `ForwardDone` or `Fault`
`idle`         `Backward` -> `idle`     `Working` (any number), then `BackwardDone` or `Fault`
`idle`         `GetCodecs` -> `idle`    `TakenCodecs`
any            (end of stream)          what runs is given up
=============  =======================  ===========================================

On a stream of the protocol `GRADIENT`. There is no session: a request brings all that it needs, nothing
depends on what came before, and any server with the blocks may be sent the next one. A `Fault` with a code in
`messages.FATAL` also ends the stream.

A backward request brings the same inputs as the forward request before, since the server computes them again,
unless it has kept them (see `swarmkit/server/training/activation_cache.py`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from swarmkit.net.protocol.codec import CodecName, LossyCodecName, TensorSpec
from swarmkit.net.protocol.messages import (
    AdapterName,
    BlockIndex,
    Count,
    Fault,
    Fingerprint,
    Millis,
    _Message,
)
from swarmkit.net.protocol.protocol import Protocol


class _Request(_Message, frozen=True):
    """Whole sequences for blocks [start, stop) of a model.

    Attributes:
        hidden: [batch, tokens, hidden], the input of block `start`.
        mask: [batch, tokens], uint8, 1 = attend; None = no padding.
        positions: [batch, tokens], int64, the position ids; None = 0, 1, …
        states: the outputs of all the blocks are wanted, not only the last one's.
        adapter: what changes these blocks (`adapter_messages`), which the server was given before.
        trains: on the way back, the gradient with respect to the adapter's values is wanted, too.
        answer: the codec in which the output, or the gradient of the input, is wanted.
    """

    fingerprint: Fingerprint
    start: BlockIndex
    stop: BlockIndex
    hidden: TensorSpec
    mask: TensorSpec | None = None
    positions: TensorSpec | None = None
    states: bool = False
    adapter: AdapterName = ""
    trains: bool = False
    answer: CodecName = "none"


class Forward(_Request, frozen=True, kw_only=True):
    """Run the blocks.

    Attributes:
        returns: the client will ask for the backward pass; activations that are kept save half of it.
    """

    returns: bool = False


class Backward(_Request, frozen=True, kw_only=True):
    """Run the blocks again, and go back through them.

    Attributes:
        gradient: with respect to the output of the `Forward` that is alike, and of its shape.
    """

    gradient: TensorSpec


class GetCodecs(_Message, frozen=True):
    """Ask in which codecs hidden states and gradients may travel."""


class TakenCodecs(_Message, frozen=True):
    """Those that the server takes and gives, besides `none`."""

    names: Annotated[tuple[LossyCodecName, ...], msgspec.Meta(max_length=16)] = ()


BytesPerSecond = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]
"""What the way carries by which a request came, as far as its receiver has seen; 0 = not known."""


class Working(_Message, frozen=True):
    """The request is under way: so many of its parts are done. Sent now and then, lest the client give up."""

    done: Count
    total: Count


class ForwardDone(_Message, frozen=True):
    """The output [batch, tokens, hidden], or of all blocks [blocks, batch, tokens, hidden]; and its times."""

    hidden: TensorSpec
    queue_ms: Millis
    compute_ms: Millis
    bytes_per_s: BytesPerSecond = 0.0


class BackwardDone(_Message, frozen=True):
    """The gradients with respect to the request's inputs, each of the input's shape.

    Attributes:
        adapter: of the adapter's values, [numel], in their order; for these blocks only.
    """

    hidden: TensorSpec
    queue_ms: Millis
    compute_ms: Millis
    adapter: TensorSpec | None = None
    bytes_per_s: BytesPerSecond = 0.0


GradientMessage = Forward | ForwardDone | Backward | BackwardDone | GetCodecs | TakenCodecs | Working | Fault
GradientRequest = Forward | Backward

GRADIENT = Protocol(
    "grad",
    GradientMessage,
    legal={"idle": {Forward: "idle", Backward: "idle", GetCodecs: "idle"}},
    first="idle",
)
