"""What client and server say to each other: typed messages and the order in which they are legal.

=============  =======================  ===========================================
state          the client may send      the server answers with
=============  =======================  ===========================================
`new`          `Open`  -> `open`        `Opened`, or `Fault` (stays `new`)
`new`          `GetInfo` -> `new`       `ServerInfo`
`new`          `GetResources` -> `new`     `Resources`, or `Fault` where the owner wants none
`open`         `Step`  -> `open`        `StepDone`, or `Fault`
`open`         `RestorePrefix` -> `open`       `PrefixRestored`, or `Fault`
`open`         `Link`  -> `open`        `Linked`, or `Fault`
any            (end of stream)          the session ends, its cache is freed
=============  =======================  ===========================================

A session is one stream: it lives exactly as long as the stream does, so a client that vanishes can leave
nothing behind. A `Fault` with a code in `FATAL` also ends the stream.

A step's output may go straight to the server that has the next blocks (`Link`, then `Step.forward`). That
takes a stream of its own, of the protocol `PUSH`, from server to server. The server that opens it names the
session with the secret that the session's client was told. The answers to steps that came by it go to the
client:

=============  =======================  ===========================================
state          a server may send        the next server answers with
=============  =======================  ===========================================
`loose`        `Attach` -> `attached`   `Attached`, or `Fault` and the end
`attached`     `Step` -> `attached`     nothing here; the session's client is told
any            (end of stream)          `Unlinked`, to the session's client
=============  =======================  ===========================================
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal, get_args

import msgspec

from swarmkit.net.protocol.codec import CodecName, LossyCodecName, TensorSpec
from swarmkit.net.protocol.protocol import Protocol

FaultCode = Literal[
    "bad_message",  # bytes that are not a message of this protocol version
    "illegal_message",  # a message that is not allowed in this state, such as a step without a session
    "wrong_model",  # the fingerprint is not the served model's
    "blocks_not_held",  # the block range is not inside the served one
    "bad_shape",
    "bad_dtype",
    "bad_value",  # a mask that is not 0/1, positions or rows out of range
    "not_finite",  # hidden states with NaN or infinity
    "out_of_order",  # a position beyond what the session holds
    "too_large",  # more tokens, rows or bytes than one step may have
    "too_long",  # beyond the session's declared length
    "upstream",  # what the server with the blocks before sent is wrong; the client may send it itself
    "not_linked",  # the next server cannot be reached from here, or does not know the session
    "not_held",  # the file that was asked for is not handed out here (any more)
    "no_adapter",  # the adapter that was named is not kept here (any more); send it
    "bad_adapter",  # it does not fit these blocks: another model's, a rank too high, values of another number
    "over_quota",  # more bytes of adapters than one client may have here
    "busy",  # no room left, in the cache or at the door; another server may have some
    "leaving",  # the server is about to stop: it takes no new sessions, and in the end no more steps
    "not_admitted",  # the lists of the server's owner exclude the peer
    "internal",  # the server's own failure
]

FATAL: frozenset[str] = frozenset({"bad_message", "illegal_message", "internal"})
"""Faults after which the two ends may disagree about the state, so that the stream is closed."""

SENDERS_FAULT: frozenset[str] = frozenset(
    {"bad_message", "illegal_message", "bad_shape", "bad_dtype", "bad_value", "not_finite"}
    | {"out_of_order", "too_large", "too_long", "bad_adapter", "over_quota"}
)
"""Faults that another server would most likely find too: trying a third one is no use."""

ServiceNumber = Annotated[int, msgspec.Meta(ge=0, le=255)]
"""Which of the services at a peer is meant."""
BlockIndex = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Total = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Millis = Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]  # which NaN is not
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=3600.0)]
Age = Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]
"""Seconds since something began."""
Fingerprint = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
AdapterName = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
"""A hash of an adapter's form and values; empty = none."""
PRINTABLE = "^[^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*\\Z"
"""A pattern without control characters: strangers' words are shown to people, in terminals too."""
Text = Annotated[str, msgspec.Meta(max_length=2000, pattern=PRINTABLE)]
Inlet = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{32})?$")]
"""A secret that names a session to the server which may push steps into it; empty = none may."""
ShortText = Annotated[str, msgspec.Meta(max_length=128, pattern=PRINTABLE)]
MAX_ADDRESSES = 16
Addresses = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=256, pattern=PRINTABLE)], ...],
    msgspec.Meta(max_length=MAX_ADDRESSES),
]
"""Where a peer says that it can be dialled."""
PageName = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""See `models.pages`."""
MAX_RESTORED_PAGES = 1024
HIDDEN_DTYPES = ("float32", "bfloat16", "float16")
"""What hidden states may travel as."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Frozen, closed to unknown fields, and tagged with the class's name."""


class Open(_Message, frozen=True):
    """Open a session on blocks [start, stop) of a model, for at most `max_length` tokens a row.

    Attributes:
        adapter: what changes these blocks in all its steps; it must be kept here already.
    """

    fingerprint: Fingerprint
    start: BlockIndex
    stop: BlockIndex
    max_length: Count
    adapter: AdapterName = ""


class Opened(_Message, frozen=True):
    """The session is open. One step may have `max_step_tokens` = batch x tokens at most.

    Attributes:
        pages: what the names of pages that this session may find begin with; empty = none are kept.
        dtype: in which the inputs are taken for these names: the server's own.
        codecs: in which it takes and gives hidden states, besides `none`.
    """

    max_step_tokens: Count
    inlet: Inlet = ""
    pages: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    dtype: ShortText = ""
    codecs: Annotated[tuple[LossyCodecName, ...], msgspec.Meta(max_length=16)] = ()


class RestorePrefix(_Message, frozen=True):
    """Let a session that has done nothing yet begin with the pages of these names, as many as are kept."""

    names: Annotated[tuple[PageName, ...], msgspec.Meta(max_length=MAX_RESTORED_PAGES)]


class PrefixRestored(_Message, frozen=True):
    """The session holds that many tokens."""

    tokens: Count


class Link(_Message, frozen=True):
    """From now on, the outputs of steps with `forward` go on to the session `inlet` at a peer's service.

    The server dials the addresses that the peer has announced, and not those that stand here.
    """

    peer_id: ShortText
    addresses: Addresses
    inlet: Inlet
    service: ServiceNumber = 0


class Linked(_Message, frozen=True):
    """The next server is reached, and knows the session."""


class Attach(_Message, frozen=True):
    """The steps on this stream are for the session that has this secret."""

    inlet: Inlet


class Attached(_Message, frozen=True):
    """They are welcome."""


class Unlinked(_Message, frozen=True):
    """No more steps come from the server before; `number` is the last one that did."""

    number: Count


class Step(_Message, frozen=True):
    """Run the session's blocks over `hidden`, after an optional edit of the cache.

    First keep only the first `position` cached tokens, then keep the cached rows `order` (in that order,
    repetitions allowed), then append and attend.

    Attributes:
        position: where `hidden` begins; at most what the session holds.
        hidden: [batch, tokens, hidden].
        mask: [batch, position + tokens], uint8, 1 = attend; None = no padding.
        positions: [batch, tokens], int64, the position ids; None = position, position + 1, …
        order: rows of the cache that become rows 0, 1, …; None = as they are.
        keep: how many of the last tokens' outputs the client wants back.
        number: the client's count of its steps, which the answer repeats. A step that was pushed here and is
            not above all before it comes too late, and is dropped.
        forward: over how many more servers the outputs are pushed on (all of them: `keep` = tokens).
        answers: in which codec this server gives its outputs, to the client as to the next server, and then
            in which the servers do that they are pushed on to; `none` for those it does not name.
        patience_s: how long its client waits for the answer, counted from when the step comes; 0 = not said.
        lean: a server that has pushed its outputs on need not send them to the client, which keeps none.
    """

    position: Count
    hidden: TensorSpec
    keep: Count
    mask: TensorSpec | None = None
    positions: TensorSpec | None = None
    order: Annotated[tuple[Count, ...], msgspec.Meta(max_length=4096)] | None = None
    number: Count = 0
    forward: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    answers: Annotated[tuple[CodecName, ...], msgspec.Meta(max_length=4097)] = ()
    patience_s: Seconds = 0.0
    lean: bool = False


class StepDone(_Message, frozen=True):
    """A step's output [batch, keep, hidden] and where its time went.

    `leaving` asks the client to move its session elsewhere while this server still answers. `forwarded` says
    that the output was also pushed to the linked server. `bytes_per_s` is what the way carries by which the
    step came, as far as was seen here; 0 = not known. `ahead` steps were here when it came, for which the
    server expected it to wait `expected_ms`.
    """

    hidden: TensorSpec
    queue_ms: Millis
    compute_ms: Millis
    leaving: bool = False
    number: Count = 0
    forwarded: bool = False
    bytes_per_s: Annotated[float, msgspec.Meta(ge=0.0, le=1e15)] = 0.0
    ahead: Count = 0
    expected_ms: Millis = 0.0


class GetInfo(_Message, frozen=True):
    """Ask a server what it is doing."""


class ServerInfo(_Message, frozen=True):
    """What a server is doing right now."""

    start: BlockIndex
    stop: BlockIndex
    sessions: Count
    cache_tokens_free: Total
    cache_tokens_total: Total
    steps: Total
    leaving: bool
    waiting: Count = 0
    """Steps and jobs that run or wait."""
    expected_wait_ms: Millis = 0.0
    """Of a long step that would come now."""
    uptime_s: Age = 0.0
    """Since when it serves these blocks."""


class GetResources(_Message, frozen=True):
    """Ask a server to count all that clients can make it hold."""


class Resources(_Message, frozen=True):
    """What a server holds: for soaks, which compare it with what there was before.

    Attributes:
        streams, pushers: open streams from clients, and from servers with the blocks before.
        leased_bytes, kept_bytes: of `capacity_bytes`, what sessions have and what is kept for later ones.
        receive_budget_bytes: of large messages.
        works: steps and jobs.
        accounted: whether all bytes of the cache add up.
        tasks, threads, descriptors: of the whole process.
    """

    sessions: Count
    streams: Count
    pushers: Count
    leased_bytes: Total
    kept_bytes: Total
    capacity_bytes: Total
    receive_budget_bytes: Total
    works: Count
    accounted: bool
    tasks: Count
    threads: Count
    descriptors: Count


class Fault(_Message, frozen=True):
    """Why a request was refused, in a word for programs and a sentence for people."""

    code: FaultCode
    message: Text
    number: Count = 0
    """Of the step that was refused; 0 = whatever was sent last."""
    retry_after_s: Seconds = 0.0
    """Of a busy server: when it expects to have room."""


Message = (
    Open
    | Opened
    | RestorePrefix
    | PrefixRestored
    | Link
    | Linked
    | Attach
    | Attached
    | Unlinked
    | Step
    | StepDone
    | GetInfo
    | ServerInfo
    | GetResources
    | Resources
    | Fault
)

SESSION = Protocol(
    "session",
    Message,
    legal={
        "new": {Open: "open", GetInfo: "new", GetResources: "new"},
        "open": {Step: "open", RestorePrefix: "open", Link: "open"},
    },
    first="new",
)
PUSH = Protocol(
    "push",
    Message,
    legal={
        "loose": {Attach: "attached"},
        "attached": {Step: "attached"},
    },
    first="loose",
)


def printable(text: str) -> str:
    """`text` with a space in the place of everything that is not for the eye."""
    return "".join(character if character.isprintable() else " " for character in text)


def tensor_specs(message: msgspec.Struct) -> list[TensorSpec]:
    """The tensors of a message, in the order in which their bytes stand in the payload."""
    specs = []
    for name in _tensor_fields(type(message)):
        spec = getattr(message, name)
        if spec is not None:
            specs.append(spec)
    return specs


@cache
def _tensor_fields(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """The fields of a message that hold a tensor, or None."""
    return tuple(
        field.name
        for field in msgspec.structs.fields(kind)
        if field.type is TensorSpec or TensorSpec in get_args(field.type)
    )
