"""Conversations that were really held, and mutations of them, for peers that must not mind.

`tapped` is a transport that writes down what passes on the streams that are opened through it. `mutations`
says what a `Mutator` makes of a conversation; it draws everything from one seed, so that what was found can
be found again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from swarmkit.net.connect import TransportFactory
from swarmkit.net.rpc.message_stream import CHUNK_BYTES, HEAD
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.part import PartStream, PartTransport
from swarmkit.net.transport.seam import Buffer, RecordCheck, Stream, Transport


@dataclass
class Conversation:
    """What the opener of a stream sent, frame by frame.

    Attributes:
        peer_id: to which peer.
        name: of the endpoint.
    """

    peer_id: str
    name: str
    frames: list[bytes] = field(default_factory=list)


class _TappedStream(PartStream):
    def __init__(self, stream: Stream, conversation: Conversation) -> None:
        super().__init__(stream)
        self._conversation = conversation

    async def send(self, *parts: Buffer) -> None:
        self._conversation.frames.append(b"".join(bytes(part) for part in parts))
        await super().send(*parts)


class _TappedTransport(PartTransport):
    def __init__(self, inner: Transport, tape: list[Conversation]) -> None:
        super().__init__(inner)
        self._tape = tape

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        stream = await super().open(peer_id, name, addresses, timeout)
        self._tape.append(Conversation(peer_id, name))
        return _TappedStream(stream, self._tape[-1])


def tapped(factory: TransportFactory, tape: list[Conversation]) -> TransportFactory:
    """The same transports, which write down on `tape` what is sent on the streams that they open."""

    async def create(identity: Identity, record_check: RecordCheck) -> Transport:
        return _TappedTransport(await factory(identity, record_check), tape)

    return create


HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 255, 2**31 - 1, 2**31, 2**53, 2**63 - 1, -(2**63), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "a", "\x00", "\x1b[2J", "a" * 5000, "0" * 32, "f" * 64, b"", bytes(32),
    [], [0], [[]], [[0, 0, 0], "float32", "none"], [[1, 2**31, 2**31], "float16", "int8"], {},
)  # fmt: skip
"""What may stand in the place of any field."""
TYPES = (
    "Open", "Opened", "RestorePrefix", "PrefixRestored", "Link", "Linked", "Attach", "Attached", "Unlinked",
    "Step", "StepDone", "GetInfo", "ServerInfo", "GetResources", "Fault", "Forward", "Backward", "Working",
    "ForwardDone", "BackwardDone", "PutAdapter", "AdapterKept", "GetFile", "FileFound", "FileChunk",
    "GetLogits", "Logits", "AwaitKeys", "KeysAwaited", "HandOver", "HandedOver", "BringKeys", "KeysWelcome",
    "BroughtKeys", "GetKeysTaken", "KeysTaken", "Nothing",
)  # fmt: skip


_DEEPEST = "swarmkit/session"
"""The endpoint with the most states, which is chosen twice as often as others."""


class Mutator:
    """Makes hostile conversations of real ones. What it makes follows from its seed alone."""

    def __init__(self, conversations: Sequence[Conversation], seed: int) -> None:
        self._conversations = conversations
        self._by_name: dict[str, list[Conversation]] = {}
        for conversation in conversations:
            self._by_name.setdefault(conversation.name, []).append(conversation)
        self._chance = random.Random(seed)
        self._mutations: tuple[Callable[[list[bytes]], list[bytes]], ...] = (
            self._flip_bytes,
            self._change_field,
            self._change_field,  # which goes deepest
            self._reorder,
            self._leave_out,
            self._repeat,
            self._cut_off,
            self._lie_about_sizes,
            self._change_payload,
            self._splice,
            self._insert_garbage,
        )

    def next(self) -> Conversation:
        """One more hostile conversation; now and then at another endpoint than the real one."""
        chosen = self._chance.choice(self._by_name[self._chance.choice((*self._by_name, _DEEPEST))])
        frames = list(chosen.frames)
        for _ in range(self._chance.choice((1, 1, 1, 2, 3))):
            frames = self._chance.choice(self._mutations)(frames)
        if self._chance.random() < 0.05:
            chosen = replace(chosen, name=self._chance.choice(self._conversations).name)
        return replace(chosen, frames=frames)

    def waits(self) -> bool:
        """Whether the next conversation's messages wait for answers to those before, as real ones do."""
        return self._chance.random() < 0.8

    def _some(self, frames: list[bytes]) -> int:
        """Which frame is meant: mostly not the first one, after whose refusal no more is looked at."""
        first = 1 if len(frames) > 1 and self._chance.random() < 0.8 else 0
        return self._chance.randrange(first, len(frames))

    def _flip_bytes(self, frames: list[bytes]) -> list[bytes]:
        at = self._some(frames)
        if not frames[at]:
            return frames
        changed = bytearray(frames[at])
        reach = len(changed) if self._chance.random() < 0.3 else min(len(changed), 200)
        for _ in range(self._chance.randint(1, 8)):
            changed[self._chance.randrange(reach)] = self._chance.randrange(256)
        return [*frames[:at], bytes(changed), *frames[at + 1 :]]

    def _change_field(self, frames: list[bytes]) -> list[bytes]:
        at = self._some(frames)
        parts = taken_apart(frames[at])
        if parts is None or not parts[0]:
            return frames
        header, payload = parts
        name = self._chance.choice(sorted(header, key=str))
        match self._chance.randrange(6):
            case 0:
                del header[name]
            case 1:
                header[self._chance.choice(("x", "type", "hidden", "\x1b"))] = self._hostile()
            case 2:
                header["type"] = self._chance.choice(TYPES)
            case 3 if isinstance(header[name], list) and header[name]:
                inner = list(header[name])
                inner[self._chance.randrange(len(inner))] = self._hostile()
                header[name] = inner
            case 4 if isinstance(header[name], int) and not isinstance(header[name], bool):
                header[name] += self._chance.choice((-1, 1, 7, 2**20))
            case _:
                header[name] = self._hostile()
        return [*frames[:at], put_together(header, payload), *frames[at + 1 :]]

    def _hostile(self) -> Any:
        return self._chance.choice(HOSTILE)

    def _reorder(self, frames: list[bytes]) -> list[bytes]:
        return self._chance.sample(frames, len(frames))

    def _leave_out(self, frames: list[bytes]) -> list[bytes]:
        at = self._some(frames)
        return frames[:at] + frames[at + 1 :] or frames

    def _repeat(self, frames: list[bytes]) -> list[bytes]:
        at = self._some(frames)
        times = self._chance.choice((1, 1, 2, 20))
        return frames[: at + 1] + [frames[at]] * times + frames[at + 1 :]

    def _cut_off(self, frames: list[bytes]) -> list[bytes]:
        at = self._some(frames)
        short = frames[at][: self._chance.randrange(len(frames[at]) + 1)]
        goes_on = frames[at + 1 :] if self._chance.random() < 0.5 else []
        return [*frames[:at], short, *goes_on]

    def _lie_about_sizes(self, frames: list[bytes]) -> list[bytes]:
        at = self._some(frames)
        if len(frames[at]) < HEAD.size:
            return frames
        magic, version, header_bytes, payload_bytes, sent_at = HEAD.unpack_from(frames[at])
        lies = (0, 1, CHUNK_BYTES, 2**24, 2**31, 2**32 - 1)
        if self._chance.random() < 0.5:
            header_bytes = self._chance.choice((*lies, min(header_bytes + 1, 2**32 - 1)))
        else:
            payload_bytes = self._chance.choice((*lies, payload_bytes ^ 1, 2**40, 2**64 - 1))
        head = HEAD.pack(magic, version, header_bytes, payload_bytes, sent_at)
        return [*frames[:at], head + frames[at][HEAD.size :], *frames[at + 1 :]]

    def _change_payload(self, frames: list[bytes]) -> list[bytes]:
        at = self._some(frames)
        parts = taken_apart(frames[at])
        if parts is None or not parts[1]:
            return frames
        payload = bytearray(parts[1])
        match self._chance.randrange(3):
            case 0:
                payload = bytearray(b"\xff" * len(payload))  # NaN as a float
            case 1:
                payload = bytearray(self._chance.randbytes(len(payload)))
            case _:
                payload = payload[: self._chance.randrange(len(payload))]
        return [*frames[:at], put_together(parts[0], bytes(payload)), *frames[at + 1 :]]

    def _splice(self, frames: list[bytes]) -> list[bytes]:
        other = self._chance.choice(self._conversations).frames
        at, since = self._some(frames), self._some(other)
        return frames[:at] + other[since : since + self._chance.randint(1, 4)] + frames[at:]

    def _insert_garbage(self, frames: list[bytes]) -> list[bytes]:
        at = self._some(frames)
        garbage = self._chance.randbytes(self._chance.choice((0, 1, 22, 23, 100, 70_000)))
        return [*frames[:at], garbage, *frames[at:]]


def taken_apart(frame: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and payload of a frame that begins a message; None of any other."""
    if len(frame) < HEAD.size:
        return None
    _, _, header_bytes, _, _ = HEAD.unpack_from(frame)
    try:
        header = msgspec.msgpack.decode(frame[HEAD.size : HEAD.size + header_bytes])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return (header, frame[HEAD.size + header_bytes :]) if isinstance(header, dict) and header else None


def put_together(header: dict[str, Any], payload: bytes) -> bytes:
    """A message in one frame."""
    encoded = msgspec.msgpack.encode(header)
    return HEAD.pack(b"SK", 2, len(encoded), len(payload), 0.0) + encoded + payload
