"""What a protocol is: the messages that two peers exchange on one kind of stream, and when each is legal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from swarmkit.errors import IllegalMessageError

PROTOCOL_VERSION = 2
"""Stands in every message. Peers of different versions refuse each other's messages, and say so."""


@dataclass(frozen=True)
class Protocol:
    """The messages on streams of one name, and the order in which the peer that opened the stream sends them.

    Attributes:
        name: the endpoint that serves such streams is called `swarmkit/<name>`.
        messages: the union of all message types, in both directions.
        legal: for each state, the messages that the opener of the stream may send, and the state after each.
        first: the state of a stream that was just opened.
    """

    name: str
    messages: Any
    legal: Mapping[str, Mapping[type, str]]
    first: str
    decoder: msgspec.msgpack.Decoder[Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder", msgspec.msgpack.Decoder(self.messages))

    @property
    def endpoint(self) -> str:
        """The name under which a transport opens and serves such streams."""
        return f"swarmkit/{self.name}"

    def illegal(self, state: str, message: object) -> IllegalMessageError:
        """The error of a message that is not one of `legal[state]`."""
        legal = ", ".join(kind.__name__ for kind in self.legal[state])
        return IllegalMessageError(
            f"a peer may not send {type(message).__name__} in state '{state}'; legal here: {legal}"
        )
