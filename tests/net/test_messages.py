"""The order in which messages are legal, and what a message may contain."""

from __future__ import annotations

import re
from typing import Any, get_args

import msgspec
import pytest

from swarmkit.errors import IllegalMessageError, ProtocolError
from swarmkit.net.protocol import messages
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import (
    FATAL,
    PUSH,
    SENDERS_FAULT,
    SESSION,
    Attach,
    Attached,
    Fault,
    FaultCode,
    GetInfo,
    GetResources,
    Link,
    Linked,
    Message,
    Open,
    Opened,
    PrefixRestored,
    Resources,
    RestorePrefix,
    ServerInfo,
    Step,
    StepDone,
    Unlinked,
    printable,
    tensor_specs,
)

SPEC = TensorSpec((1, 1, 2), "float32")
PROTOCOL_OF = {state: protocol for protocol in (SESSION, PUSH) for state in protocol.legal}
EXAMPLES: list[Message] = [
    Open("0" * 32, 0, 2, 10),
    Opened(16),
    Opened(16, "ab" * 16, bytes(32), "bfloat16", ("int8",)),
    RestorePrefix((bytes(32), bytes(range(32)))),
    PrefixRestored(64),
    Link("peer", ("/ip4/127.0.0.1/tcp/1",), "0" * 32),
    Linked(),
    Attach("0" * 32),
    Attached(),
    Unlinked(7),
    Step(0, SPEC, 1),
    Step(3, SPEC, 1, TensorSpec((1, 4), "uint8"), TensorSpec((1, 1), "int64"), (1, 0), 7, 2, ("int8",)),
    Step(3, SPEC, 1, patience_s=2.5),
    StepDone(SPEC, 0.5, 1.5, True),
    StepDone(SPEC, 0.5, 1.5, ahead=3, expected_ms=70.5),
    GetInfo(),
    ServerInfo(0, 2, 1, 100, 200, 7, False),
    ServerInfo(0, 2, 1, 100, 200, 7, False, 3, 70.5, 3600.5),
    GetResources(),
    Resources(1, 2, 0, 100, 50, 200, 0, 0, True, 9, 3, 20),
    Fault("busy", "no room"),
    Fault("busy", "no room", 3, 2.5),
]


def read(message: Any) -> Message:
    decoded: Message = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Message)  # type: ignore[call-overload]
    return decoded


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_it_was_written(message: Message) -> None:
    assert read(message) == message


def test_every_kind_of_message_has_an_example() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(Message))


# the conversation


@pytest.mark.parametrize(
    ("state", "message", "following"),
    [
        ("new", Open("0" * 32, 0, 2, 10), "open"),
        ("new", GetInfo(), "new"),
        ("new", GetResources(), "new"),
        ("open", Step(0, SPEC, 1), "open"),
        ("open", Link("peer", (), "0" * 32), "open"),
        ("loose", Attach("0" * 32), "attached"),
        ("attached", Step(0, SPEC, 1), "attached"),
    ],
)
def test_what_a_client_may_say(state: Any, message: Message, following: str) -> None:
    assert PROTOCOL_OF[state].legal[state][type(message)] == following


@pytest.mark.parametrize("state", PROTOCOL_OF)
@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_everything_else_is_named_with_what_would_be_legal(state: Any, message: Message) -> None:
    protocol = PROTOCOL_OF[state]
    if type(message) in protocol.legal[state]:
        return
    legal = ", ".join(kind.__name__ for kind in protocol.legal[state])
    error = str(protocol.illegal(state, message))
    assert re.search(f"{type(message).__name__} in state '{state}'.*{legal}", error), error


def test_an_illegal_message_is_the_peers_fault() -> None:
    assert issubclass(IllegalMessageError, ProtocolError)


def test_the_table_in_the_documentation_is_the_table_in_use() -> None:
    assert messages.__doc__ is not None
    rows = re.findall(r"^`(\w+)`\s+`(\w+)`\s+-> `(\w+)`", messages.__doc__, re.MULTILINE)
    table = [
        (state, kind.__name__, then)
        for protocol in (SESSION, PUSH)
        for state, row in protocol.legal.items()
        for kind, then in row.items()
    ]
    assert rows == table


@pytest.mark.parametrize("codes", [FATAL, SENDERS_FAULT], ids=["fatal", "senders fault"])
def test_sets_of_codes_hold_codes(codes: frozenset[str]) -> None:
    assert codes <= set(get_args(FaultCode))


# contents


def test_tensors_are_in_the_order_of_the_fields() -> None:
    mask, positions = TensorSpec((1, 4), "uint8"), TensorSpec((1, 1), "int64")
    assert tensor_specs(Step(3, SPEC, 1, mask, positions)) == [SPEC, mask, positions]


def test_a_message_without_tensors_has_none() -> None:
    assert tensor_specs(GetInfo()) == []


WRONG: list[dict[str, Any]] = [
    {"type": "Fault", "code": "no_such_code", "message": ""},
    {"type": "Fault", "code": "busy", "message": "x" * 2001},
    {"type": "Fault", "code": "busy", "message": "two\nlines"},
    {"type": "Fault", "code": "busy", "message": "\x1b[2J"},
    {"type": "Fault", "code": "busy", "message": "\u202egnorw"},
    {"type": "StepDone", "hidden": SPEC, "queue_ms": float("nan"), "compute_ms": 0.0},
    {"type": "StepDone", "hidden": SPEC, "queue_ms": 0.0, "compute_ms": float("inf")},
    {"type": "StepDone", "hidden": SPEC, "queue_ms": -1.0, "compute_ms": 0.0},
    {"type": "StepDone", "hidden": None, "queue_ms": 0.0, "compute_ms": 0.0},
    {"type": "StepDone", "hidden": SPEC, "queue_ms": 0.0, "compute_ms": 0.0, "ahead": -1},
    {"type": "StepDone", "hidden": SPEC, "queue_ms": 0.0, "compute_ms": 0.0, "expected_ms": float("nan")},
    {"type": "Fault", "code": "busy", "message": "", "retry_after_s": float("nan")},
    {"type": "Fault", "code": "busy", "message": "", "retry_after_s": float("inf")},
    {"type": "Fault", "code": "busy", "message": "", "retry_after_s": -1.0},
    {"type": "Fault", "code": "busy", "message": "", "retry_after_s": 3601.0},
    {"type": "ServerInfo", "start": 0, "stop": 1, "sessions": 0, "waiting": -1},
    {"type": "Opened", "max_step_tokens": -1},
    {"type": "Opened", "max_step_tokens": 2**64 - 1},
    {"type": "Opened", "max_step_tokens": "many"},
    {"type": "Opened"},
    {"type": "Opened", "max_step_tokens": 1, "more": 1},
    {"type": "Open", "fingerprint": "g" * 32, "start": 0, "stop": 1, "max_length": 1},
    {"type": "Opened", "max_step_tokens": 1, "inlet": "secret"},
    {"type": "Attach", "inlet": "0" * 33},
    {"type": "Link", "peer_id": "p", "addresses": ["/ip4/1.2.3.4/tcp/1"] * 17, "inlet": "0" * 32},
    {"type": "Link", "peer_id": "p" * 129, "addresses": [], "inlet": "0" * 32},
    {"type": "Step", "position": 0, "hidden": SPEC, "keep": 1, "forward": -1},
    {"type": "Step", "position": 0, "hidden": SPEC, "keep": 1, "forward": 4097},
    {"type": "ServerInfo", "start": 0, "stop": 1, "sessions": -1},
]


@pytest.mark.parametrize("message", WRONG, ids=str)
def test_values_out_of_range_are_not_read(message: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        read(message)


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "\u202egnorw", "\x00", "\x9b", "½ → ✓", ""])
def test_what_was_made_printable_is_read(text: str) -> None:
    fault = Fault("busy", printable(text))
    assert read(fault) == fault


def test_printable_words_stay_as_they_are() -> None:
    assert printable("½ → ✓ is fine") == "½ → ✓ is fine"


def test_a_server_with_an_enormous_cache_can_say_so() -> None:
    info = ServerInfo(0, 2, 1, 2**40, 2**41, 2**40, False)
    assert read(info) == info
