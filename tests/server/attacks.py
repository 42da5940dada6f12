"""What a stranger may send, and what it must be told."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import (
    Fault,
    GetInfo,
    GetResources,
    Open,
    Opened,
    Resources,
    RestorePrefix,
    ServerInfo,
    Step,
    StepDone,
)
from swarmkit.net.rpc.message_stream import CHUNK_BYTES, HEAD, MAX_HEADER_BYTES

from .worlds import (
    HIDDEN,
    START,
    STOP,
    frame,
    head,
)

NAME = bytes(32)
ROWS, HELD, LENGTH = 2, 4, 8
"""An attacker with a session has two rows of four tokens there, and said that there will be eight."""

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Attack:
    """Frames that must not be sent, and what their sender is told."""

    name: str
    code: str
    says: str
    """A regular expression for the message."""
    frames: list[bytes] = field(repr=False)
    in_session: bool = True

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


# what is sent


def spec(*shape: int, dtype: Any = "float32", codec: Any = "none") -> TensorSpec:
    return TensorSpec(shape, dtype, codec)


def step(
    hidden: TensorSpec | None = None, payload: bytes | None = None, position: int = HELD, **fields: Any
) -> list[bytes]:
    """A step of one token, apart from what is wrong with it. Its tensors are zeros if not given."""
    hidden = hidden or spec(ROWS, 1, HIDDEN)
    message = Step(position, hidden, fields.pop("keep", 1), **fields)
    tensors = (hidden, message.mask, message.positions)
    if payload is None:
        payload = bytes(sum(tensor.nbytes for tensor in tensors if tensor is not None))
    return [frame(message, payload)]


def step_of(tensor: torch.Tensor, *more: torch.Tensor, **fields: Any) -> list[bytes]:
    """A step of given values; `more` are mask and positions."""
    names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
    parts = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in (tensor, *more)]
    return step(spec(*tensor.shape, dtype=names[tensor.dtype]), b"".join(parts), **fields)


def poisoned(value: float, dtype: torch.dtype = torch.float32) -> list[bytes]:
    hidden = torch.zeros(ROWS, 1, HIDDEN, dtype=dtype)
    hidden[-1, -1, -1] = value
    return step_of(hidden)


def scaled(exponent: int) -> list[bytes]:
    """Hidden states in int8 whose last block has that scale."""
    scales, values = torch.zeros(ROWS, dtype=torch.int8), torch.full((ROWS, 1, HIDDEN), 100, dtype=torch.int8)
    scales[-1] = exponent
    return step(INT8, scales.numpy().tobytes() + values.numpy().tobytes())


def masked(value: int) -> list[bytes]:
    mask = torch.ones(ROWS, HELD + 1, dtype=torch.uint8)
    mask[0, 0] = value
    return step_of(torch.zeros(ROWS, 1, HIDDEN), mask, mask=spec(ROWS, HELD + 1, dtype="uint8"))


def placed(value: int) -> list[bytes]:
    return step_of(
        torch.zeros(ROWS, 1, HIDDEN), torch.full((ROWS, 1), value), positions=spec(ROWS, 1, dtype="int64")
    )


def altered(message: Any, **fields: Any) -> list[bytes]:
    """A message as a plain map, with fields replaced, added, or (None) left out."""
    plain = {"type": type(message).__name__, **{f: getattr(message, f) for f in message.__struct_fields__}}
    return [frame({key: value for key, value in {**plain, **fields}.items() if value is not None})]


def raw(header: bytes) -> list[bytes]:
    """A header that is not what an encoder would write."""
    return [head(header, 0)]


INT8 = spec(ROWS, 1, HIDDEN, codec="int8")
FINGERPRINT = "0123456789abcdef" * 2  # of another model than the served one
OPEN = Open(FINGERPRINT, START, STOP, LENGTH)
PAYLOAD = ROWS * HIDDEN * 4  # bytes of `step()`
STEP = step()[0]
LARGE = spec(1, 2 * CHUNK_BYTES // (HIDDEN * 4), HIDDEN)  # comes in several frames
LARGE_HEAD = frame(Step(0, LARGE, 1), payload_bytes=LARGE.nbytes)

OPENING = [
    Attack("another model", "wrong_model", FINGERPRINT, [frame(OPEN)]),
    Attack("fingerprint in capitals", "bad_message", "fingerprint", altered(OPEN, fingerprint="A" * 32)),
    Attack("fingerprint too short", "bad_message", "fingerprint", altered(OPEN, fingerprint="a" * 31)),
    Attack("fingerprint too long", "bad_message", "fingerprint", altered(OPEN, fingerprint="a" * 9999)),
    Attack("no fingerprint", "bad_message", "missing.*fingerprint", altered(OPEN, fingerprint=None)),
    Attack("blocks below zero", "bad_message", r"\$.start", altered(OPEN, start=-1)),
    Attack("block beyond any model", "bad_message", r"\$.stop", altered(OPEN, stop=2**31)),
    Attack("block as text", "bad_message", r"\$.start", altered(OPEN, start="1")),
    Attack("block as fraction", "bad_message", r"\$.start", altered(OPEN, start=1.5)),
    Attack("block as list", "bad_message", r"\$.start", altered(OPEN, start=[1])),
    Attack("length beyond any session", "bad_message", r"\$.max_length", altered(OPEN, max_length=2**40)),
    Attack("unknown field in Open", "bad_message", "unknown field.*admin", altered(OPEN, admin=True)),
    Attack("terminal codes", "bad_message", r"unknown field ` \[2J x`", altered(OPEN, **{"\x1b[2J\nx": 1})),
    Attack("Open with a payload", "bad_message", "0 bytes.*payload of 4", [frame(OPEN, b"1234")]),
    Attack("unknown field in GetInfo", "bad_message", "unknown field.*x", altered(GetInfo(), x=1)),
    Attack("a count that the owner does not allow", "illegal_message", "owner", [frame(GetResources())]),
    Attack("unknown field in GetResources", "bad_message", "unknown field.*x", altered(GetResources(), x=1)),
    Attack("GetInfo with a payload", "bad_message", "0 bytes.*payload of 1", [frame(GetInfo(), b"1")]),
    Attack("unknown session", "illegal_message", "Step in state 'new'.*Open", [STEP]),
    Attack("unknown session, much data", "illegal_message", "Step in state 'new'", [LARGE_HEAD]),
]

OUT_OF_TURN = [
    Attack("Open twice", "illegal_message", "Open in state 'open'.*Step", [frame(OPEN)]),
    Attack("pages in the midst", "out_of_order", "before the first step", [frame(RestorePrefix((NAME,)))]),
    Attack(
        "a short page name", "bad_message", r"\$.names", altered(RestorePrefix((NAME,)), names=[NAME[1:]])
    ),
    Attack(
        "a page name as text", "bad_message", r"\$.names", altered(RestorePrefix((NAME,)), names=["a" * 32])
    ),
    Attack(
        "too many pages", "bad_message", r"\$.names", altered(RestorePrefix((NAME,)), names=[NAME] * 1025)
    ),
    Attack("GetResources in a session", "illegal_message", "GetResources in state", [frame(GetResources())]),
    Attack("GetInfo in a session", "illegal_message", "GetInfo in state 'open'", [frame(GetInfo())]),
    *(
        Attack(
            f"{type(message).__name__} from a client{' in a session' if in_session else ''}",
            "illegal_message",
            f"may not send {type(message).__name__}",
            [frame(message)],
            in_session,
        )
        for message in (
            Opened(1),
            StepDone(spec(0), 0.0, 0.0),
            ServerInfo(0, 1, 0, 0, 0, 0, False),
            Resources(0, 0, 0, 0, 0, 0, 0, 0, True, 0, 0, 0),
            Fault("internal", "you are broken"),
        )
        for in_session in (False, True)
    ),
]

STEPPING = [
    # shape
    Attack("hidden of two dimensions", "bad_shape", r"\[2, 32\]", step(spec(2, HIDDEN))),
    Attack("hidden of four dimensions", "bad_shape", r"\[2, 1, 32, 1\]", step(spec(2, 1, HIDDEN, 1))),
    Attack("hidden of five dimensions", "bad_message", "length", step(spec(1, 1, 1, 1, 1))),
    Attack("hidden without dimensions", "bad_shape", r"got \[\]", step(spec())),
    Attack("hidden too narrow", "bad_shape", r"tokens, 32\], got \[2, 1, 31\]", step(spec(2, 1, 31))),
    Attack("hidden too wide", "bad_shape", r"\[2, 1, 33\]", step(spec(2, 1, 33))),
    Attack("no rows", "bad_shape", r"\[0, 1, 32\]", step(spec(0, 1, HIDDEN))),
    Attack("no tokens", "bad_shape", r"\[2, 0, 32\]", step(spec(2, 0, HIDDEN), keep=0)),
    Attack("no width", "bad_shape", r"\[2, 1, 0\]", step(spec(2, 1, 0))),
    Attack("no rows of endless tokens", "bad_shape", r"\[0, ", step(spec(0, 2**31, HIDDEN))),
    Attack("negative size", "bad_message", "hidden", step(spec(-2, 1, HIDDEN), b"")),
    Attack("a row more than before", "bad_shape", "3 rows, the session 2", step(spec(3, 1, HIDDEN))),
    Attack("a row less than before", "bad_shape", "1 rows, the session 2", step(spec(1, 1, HIDDEN))),
    Attack("more outputs than tokens", "bad_shape", "2 outputs.*1 tokens", step(keep=2)),
    Attack("negative outputs", "bad_message", "keep", step(keep=-1)),
    # patience
    Attack("negative patience", "bad_message", "patience_s", step(patience_s=-1.0)),
    Attack("endless patience", "bad_message", "patience_s", step(patience_s=float("inf"))),
    Attack("patience that is no number", "bad_message", "patience_s", step(patience_s=float("nan"))),
    Attack("patience as text", "bad_message", "patience_s", step(patience_s="long")),
    # dtype
    Attack("hidden of integers", "bad_dtype", "int64", step(spec(ROWS, 1, HIDDEN, dtype="int64"))),
    Attack("hidden of bytes", "bad_dtype", "uint8", step(spec(ROWS, 1, HIDDEN, dtype="uint8"))),
    Attack(
        "integers in a float's codec",
        "bad_dtype",
        "int64",
        step(spec(2, 1, 32, dtype="int64", codec="float16")),
    ),
    Attack("unknown dtype", "bad_message", "float64", altered(Step(4, [[2, 1, 32], "float64", "none"], 1))),  # type: ignore[arg-type]
    Attack("unknown codec", "bad_message", "zip", altered(Step(4, [[2, 1, 32], "float32", "zip"], 1))),  # type: ignore[arg-type]
    # codecs
    Attack("int8 too short", "bad_message", "66 bytes of tensors but a payload of 65", step(INT8, bytes(65))),
    Attack("int8 as if it were float32", "bad_message", "payload of 256", step(INT8, bytes(256))),
    Attack("int8 with scales that are none", "not_finite", "NaN or infinity", scaled(-128)),
    Attack("int8 with absurd scales", "not_finite", "NaN or infinity", scaled(127)),
    Attack(
        "integers in int8", "bad_dtype", "not int64", step(spec(ROWS, 1, HIDDEN, dtype="int64", codec="int8"))
    ),
    Attack("mask in int8", "bad_dtype", "mask.*int8", step(mask=spec(ROWS, 5, dtype="uint8", codec="int8"))),
    Attack("answers in an unknown codec", "bad_message", r"zip.*\$.answers", step(answers=("zip",))),
    Attack("answers as text", "bad_message", r"\$.answers", step(answers="int8")),
    Attack("endless answers", "bad_message", r"\$.answers", step(answers=("int8",) * 4098)),
    # size
    Attack(
        "too many tokens", "too_large", "2 x 9 tokens.*16 of one step", step(spec(2, 9, HIDDEN), position=0)
    ),
    Attack("too many rows", "too_large", "17 x 1 tokens", step(spec(17, 1, HIDDEN), position=0)),
    Attack("beyond the declared length", "too_long", r"4 \+ 5 tokens.*8", step(spec(ROWS, 5, HIDDEN))),
    Attack(
        "bytes over the limit",
        "too_large",
        "134217728 bytes.*allowed",
        [frame(Step(0, spec(1, 2**20, HIDDEN), 1), payload_bytes=2**27)],
    ),
    Attack(
        "an enormous announcement",
        "too_large",
        f"{2**58} bytes.*allowed",
        [frame(Step(0, spec(2**31, 2**20, HIDDEN), 1), payload_bytes=2**58)],
    ),
    Attack(
        "an announcement beyond 64 bits",
        "bad_message",
        "announces",
        [frame(Step(0, spec(2**31, 2**31, 2**31, 2**31), 1), payload_bytes=2**64 - 1)],
    ),
    # values
    *(
        Attack(f"{value} as {str(dtype)[6:]}", "not_finite", "NaN or infinity", poisoned(value, dtype))
        for value in (float("nan"), float("inf"), float("-inf"))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
    Attack(
        "infinity only once decoded",
        "not_finite",
        "NaN or infinity",
        step(spec(2, 1, HIDDEN, dtype="float16", codec="bfloat16"), b"\x7f\x7f" * 64),  # 3.4e38
    ),
    # order
    Attack("a position left out", "out_of_order", "position 5 is beyond the 4 tokens", step(position=5)),
    Attack("a position far out", "out_of_order", f"position {2**31}", step(position=2**31)),
    Attack("a position beyond counting", "bad_message", "position", step(position=2**31 + 1)),
    Attack("a negative position", "bad_message", "position", step(position=-1)),
    Attack("a row that is not there", "bad_value", "order.*2 rows", step(order=(0, 2))),
    Attack("no row at all", "bad_value", "order.*2 rows", step(order=())),
    Attack("a negative row", "bad_message", "order", step(order=(0, -1))),
    Attack("a row as text", "bad_message", "order", step(order=(0, "1"))),
    Attack("too many rows in order", "bad_message", "order", step(order=(0,) * 4097)),
    Attack("order of another batch", "bad_shape", "2 rows, the session 3", step(order=(0, 1, 1))),
    # mask
    Attack(
        "mask too short",
        "bad_shape",
        r"mask must be \[2, 5\], got \[2, 4\]",
        step(mask=spec(2, 4, dtype="uint8")),
    ),
    Attack("mask too long", "bad_shape", r"mask.*\[2, 6\]", step(mask=spec(2, 6, dtype="uint8"))),
    Attack("mask of one row", "bad_shape", r"mask.*\[1, 5\]", step(mask=spec(1, 5, dtype="uint8"))),
    Attack("mask without rows", "bad_shape", r"mask.*\[5\]", step(mask=spec(5, dtype="uint8"))),
    Attack("mask of integers", "bad_dtype", "mask.*int64", step(mask=spec(2, 5, dtype="int64"))),
    Attack("mask of floats", "bad_dtype", "mask.*float32", step(mask=spec(2, 5))),
    Attack(
        "mask in a float's codec",
        "bad_dtype",
        "mask.*float16",
        step(mask=spec(2, 5, dtype="uint8", codec="float16")),
    ),
    Attack("mask of 2", "bad_value", "mask.*0 and 1", masked(2)),
    Attack("mask of 255", "bad_value", "mask.*0 and 1", masked(255)),
    # position ids
    Attack(
        "positions too many", "bad_shape", r"positions.*\[2, 2\]", step(positions=spec(2, 2, dtype="int64"))
    ),
    Attack(
        "positions of one row", "bad_shape", r"positions.*\[1, 1\]", step(positions=spec(1, 1, dtype="int64"))
    ),
    Attack("positions of bytes", "bad_dtype", "positions.*uint8", step(positions=spec(2, 1, dtype="uint8"))),
    Attack(
        "positions in a codec",
        "bad_dtype",
        "positions.*bfloat16",
        step(positions=spec(2, 1, dtype="int64", codec="bfloat16")),
    ),
    Attack("negative positions", "bad_value", "position ids", placed(-1)),
    Attack("huge positions", "bad_value", "position ids", placed(2**24)),
    Attack("the most negative position", "bad_value", "position ids", placed(-(2**63))),
]

BYTES = [
    Attack("an empty frame", "bad_message", "0 bytes is too short", [b""]),
    Attack("a frame too short", "bad_message", "22 bytes is too short", [STEP[: HEAD.size - 1]]),
    Attack("sent before time began", "bad_message", "sent at -1", [frame(GetInfo(), sent_at=-1.0)]),
    Attack("sent at no time", "bad_message", "sent at nan", [frame(GetInfo(), sent_at=float("nan"))]),
    Attack("garbage", "bad_message", "not a swarmkit message", [random.Random(0).randbytes(1000)]),
    Attack("much garbage", "bad_message", "not a swarmkit message", [random.Random(0).randbytes(2**20)]),
    Attack(
        "another protocol", "bad_message", "not a swarmkit message", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"]
    ),
    Attack("wrong magic", "bad_message", "not a swarmkit message", [frame(GetInfo(), magic=b"XX")]),
    Attack("a later version", "bad_message", "version 3 is not 2.*update", [frame(GetInfo(), version=3)]),
    Attack("version 0", "bad_message", "version 0 is not 2", [frame(GetInfo(), version=0)]),
    Attack(
        "a header cut off",
        "bad_message",
        "header of 999 bytes.*cut off",
        [frame(GetInfo(), header_bytes=999)],
    ),
    Attack(
        "a header length of 4 GiB", "bad_message", "too large", [frame(GetInfo(), header_bytes=2**32 - 1)]
    ),
    Attack(
        "a header too large",
        "bad_message",
        "header of 65537 bytes is too large",
        [head(bytes(MAX_HEADER_BYTES + 1), 0)],
    ),
    Attack("a header length too short", "bad_message", "not valid", [frame(GetInfo(), header_bytes=3)]),
    Attack("no header", "bad_message", "not valid", raw(b"")),
    Attack("no msgpack", "bad_message", "not valid", raw(b"\xc1")),
    Attack("msgpack cut off", "bad_message", "not valid", raw(b"\x81\xa4type")),
    Attack("msgpack with a tail", "bad_message", "not valid", raw(b"\x81\xa4type\xa7AskInfo\x00")),
    Attack("text that is not UTF-8", "bad_message", "not valid", raw(b"\x81\xa4type\xa2\xff\xfe")),
    Attack("an array of 4 billion", "bad_message", "not valid", raw(b"\xdd\xff\xff\xff\xff")),
    Attack("a map of 4 billion", "bad_message", "not valid", raw(b"\xdf\xff\xff\xff\xff")),
    Attack("deep arrays", "bad_message", "not valid", raw(b"\x91" * 60_000)),
    Attack("deep maps", "bad_message", "not valid", raw(b"\x81\xa1x" * 20_000)),
    Attack(
        "deep in a field", "bad_message", "not valid", raw(b"\x82\xa4type\xa4Open\xa1x" + b"\x91" * 60_000)
    ),
    Attack("nothing", "bad_message", "not valid", raw(b"\xc0")),
    Attack("a number", "bad_message", "not valid", raw(b"\x2a")),
    Attack("a map without a type", "bad_message", "type", raw(b"\x80")),
    Attack("a list", "bad_message", "object", [frame(["GetInfo"])]),
    Attack("an unknown type", "bad_message", "Shutdown", [frame({"type": "Shutdown"})]),
    Attack("a type of type list", "bad_message", "not valid", [frame({"type": ["GetInfo"]})]),
    Attack("fields without names", "bad_message", "not valid", [frame({1: 2})]),
    Attack(
        "less payload than specs",
        "bad_message",
        "256 bytes of tensors but a payload of 0",
        [frame(Step(4, spec(2, 1, 32), 1))],
    ),
    Attack(
        "more payload than specs",
        "bad_message",
        "payload of 257",
        [frame(Step(4, spec(2, 1, 32), 1), bytes(257))],
    ),
    Attack("more bytes than announced", "bad_message", "more payload than", [STEP + b"x"]),
    Attack("pieces that are too much", "bad_message", "do not add up", [STEP[:-8], bytes(9)]),
    Attack("pieces that are nothing", "bad_message", "do not add up", [STEP[:-8], b""]),
]

ATTACKS = [
    *(Attack(a.name, a.code, a.says, a.frames, in_session=False) for a in OPENING),
    *OUT_OF_TURN,
    *STEPPING,
    *BYTES,
    *(Attack(f"{a.name} first thing", a.code, a.says, a.frames, in_session=False) for a in BYTES[:12]),
]
RANGES = [(0, STOP), (START, STOP + 1), (0, 1), (STOP, STOP + 1), (2, 2), (3, 2), (99_999, 100_000)]

each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=str)
