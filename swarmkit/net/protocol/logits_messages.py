"""How a client has its output layer computed by a server: requests that bring all they need.

=============  =======================  ===========================================
state          the client may send      the server answers with
=============  =======================  ===========================================
`idle`         `GetLogits` -> `idle`    `Logits`, or `Fault`
any            (end of stream)          nothing; nothing was kept
=============  =======================  ===========================================

On a stream of the protocol `LOGITS`. A server that answers such requests says so in its announcement
(`head_ms`), so that peers which do not know the protocol are never asked. The embeddings and the final norm
stay with the client: what is sent is the very input of the output layer.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import Fault, Fingerprint, Millis, _Message
from swarmkit.net.protocol.protocol import Protocol

MAX_LOGITS_ROWS = 64
"""Rows of one request: complete rows of a large vocabulary take half a megabyte each."""
MAX_TOP = 4096
"""Logits of one row that are told with their tokens."""


class GetLogits(_Message, frozen=True):
    """Multiply `hidden` with the output layer, in float32.

    Attributes:
        hidden: [rows, hidden], float32, the output of the model's final norm.
        top: how many of the largest logits of each row are wanted; 0 = all, in the vocabulary's order.
        temperature: logits are divided by it before their log-sum-exp is taken.
    """

    fingerprint: Fingerprint
    hidden: TensorSpec
    top: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP)]
    temperature: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0


class Logits(_Message, frozen=True):
    """The logits of each row.

    Attributes:
        values: [rows, top], float32, the largest first; or [rows, vocabulary].
        tokens: [rows, top], int64, whose logits these are; None = the whole vocabulary's.
        log_sum_exp: [rows], float32, over the whole vocabulary, of the logits divided by the temperature.
    """

    values: TensorSpec
    log_sum_exp: TensorSpec
    tokens: TensorSpec | None = None
    queue_ms: Millis = 0.0
    compute_ms: Millis = 0.0


LogitsMessage = GetLogits | Logits | Fault
LOGITS = Protocol("logits", LogitsMessage, legal={"idle": {GetLogits: "idle"}}, first="idle")
