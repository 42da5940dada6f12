"""What a protocol is: the messages that two peers exchange on one kind of stream, and when each is legal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from swarmkit.errors import IllegalMessageError

PROTOCOL_VERSION = 2
"""The newest version that this peer speaks. The version of a conversation stands in each of its messages."""

OLDEST_VERSION = 2
"""The oldest one that it speaks still. Peers without a version in common refuse each other, and say so."""


class VersionRange(NamedTuple):
    """The protocol versions that a peer speaks, from the oldest to the newest."""

    oldest: int
    newest: int

    def shared_with(self, other: tuple[int, int]) -> int | None:
        """The newest version that two peers speak, if there is one."""
        newest = min(self.newest, other[1])
        return newest if newest >= max(self.oldest, other[0]) else None

    def __str__(self) -> str:
        return str(self.newest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


OWN_VERSIONS = VersionRange(OLDEST_VERSION, PROTOCOL_VERSION)


def version_mismatch(theirs: int | tuple[int, int], own: VersionRange = OWN_VERSIONS) -> str:
    """The text that a peer without a common version is sent, and that users read about such a peer.

    Args: theirs: the version or versions that the peer speaks.
    """
    other = VersionRange(theirs, theirs) if isinstance(theirs, int) else VersionRange(*theirs)
    older = min(own, other, key=lambda versions: versions.newest)
    return f"protocol version {other} is not {own}: the peer with version {older} needs an update of swarmkit"


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
