"""Messages over a stream: versioned headers, tensors in chunks, sizes checked before memory is spent.

A message is one head frame and, where its tensors do not fit beside the head, more frames of payload::

    head frame:   "SK" | version u8 | header bytes u32 | payload bytes u64 | header (msgpack) | payload…
    more frames:  payload…                                                     (each at most CHUNK_BYTES)
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import msgspec
import torch

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import MessageTooLargeError, ProtocolError, SwarmkitError, UsageError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.link_speed import LinkSpeed
from swarmkit.net.protocol.messages import PROTOCOL_VERSION, Message, tensor_specs
from swarmkit.net.transport.seam import MAX_FRAME_BYTES, Buffer, Stream

MAX_HEADER_BYTES = 64 * 1024
CHUNK_BYTES = 1024 * 1024
"""Payload frames are smaller than the limit, so that other streams of the connection get their turn."""

_HEAD = struct.Struct(">2sBIQ")
_MAGIC = b"SK"
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)  # type: ignore[arg-type]

assert CHUNK_BYTES + MAX_HEADER_BYTES + _HEAD.size < MAX_FRAME_BYTES


class Received:
    """A message with its tensors, which are decoded when asked for (off the event loop, if large)."""

    def __init__(self, message: Message, payload: memoryview) -> None:
        self.message = message
        self._payload = payload

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor that belongs to `spec`, which must be the very object in the message."""
        return codec.decode(spec, self.raw(spec))

    def raw(self, spec: TensorSpec) -> memoryview:
        """The bytes of that tensor."""
        offset = 0
        for other in tensor_specs(self.message):
            if other is spec:
                return self._payload[offset : offset + spec.nbytes]
            offset += other.nbytes
        raise UsageError("the spec is not one of this message's own")


class Conversation:
    """Typed messages over one stream, with limits on what the other side may send.

    Args:
        max_payload_bytes: the tensors of one message may have this many bytes.
        rest_timeout: seconds within which a message that has begun must be complete, so that nobody can
            make this side hold half a message for long.
    """

    def __init__(
        self,
        stream: Stream,
        max_payload_bytes: int,
        rest_timeout: float = 60.0,
        decoder: msgspec.msgpack.Decoder[Any] = _decoder,
    ) -> None:
        self._decoder = decoder
        self.stream = stream
        self.max_payload_bytes = max_payload_bytes
        self.rest_timeout = rest_timeout
        self.in_message = False
        """Whether a message has begun to come and is not complete: whoever stops to receive now loses it."""
        self.incoming = LinkSpeed()
        """What the way from the peer carries."""
        self._began_at = SYSTEM_CLOCK.now()

    @property
    def peer_id(self) -> str:
        return self.stream.peer_id

    def clock(self) -> float:
        """Seconds since the conversation began on this side: what `sent_at` means in messages from here."""
        return SYSTEM_CLOCK.now() - self._began_at

    async def send(self, message: msgspec.Struct, payload: Sequence[Buffer] = ()) -> None:
        """Send a message; `payload` holds the bytes of its tensors, in the order of its fields.

        Raises:
            UsageError: the payload's size is not what the message's specs say.
            PeerUnreachableError: the conversation has ended.
        """
        header = _encoder.encode(message)
        parts = [memoryview(part).cast("B") for part in payload]
        total = sum(part.nbytes for part in parts)
        expected = sum(spec.nbytes for spec in tensor_specs(message))
        if total != expected:
            raise UsageError(f"the message announces {expected} bytes of tensors but comes with {total}")
        head = _HEAD.pack(_MAGIC, PROTOCOL_VERSION, len(header), total) + header
        if total <= CHUNK_BYTES:
            await self.stream.send(head, *parts)
            return
        await self.stream.send(head)
        for part in parts:
            for offset in range(0, part.nbytes, CHUNK_BYTES):
                await self.stream.send(part[offset : offset + CHUNK_BYTES])

    async def receive(self, admit: Callable[[Message], Awaitable[None]] | None = None) -> Received:
        """The next message.

        Args:
            admit: looks at a message whose header has come, before its payload is taken into memory. It
                refuses by raising, which is raised here as well: after the payload has been read and dropped,
                so that the conversation can go on, or, for a `ProtocolError`, at once.

        Raises:
            MessageTooLargeError: larger than this side allows.
            ProtocolError: not a message of this version.
            PeerUnreachableError: the peer ended the conversation or went away.
        """
        waiting_from = SYSTEM_CLOCK.now()
        message, total, body = self._parse_head(await self.stream.receive())
        self.in_message = True
        received = await self._receive_rest(message, total, body, admit)
        self.in_message = False
        if sent_at := getattr(message, "sent_at", 0.0):
            self.incoming.observe(total, sent_at, SYSTEM_CLOCK.now(), waiting_from)
        return received

    async def _receive_rest(
        self,
        message: Message,
        total: int,
        body: memoryview,
        admit: Callable[[Message], Awaitable[None]] | None,
    ) -> Received:
        if admit is not None:
            try:
                await admit(message)
            except ProtocolError:
                raise
            except SwarmkitError:
                await self._read_rest(len(body), total, None)
                self.in_message = False
                raise
        if len(body) == total:
            return Received(message, body)
        payload = bytearray(body)
        await self._read_rest(len(body), total, payload)
        return Received(message, memoryview(payload))

    def close(self) -> None:
        """End the conversation from this side. May be called twice."""
        self.stream.close()

    async def _read_rest(self, have: int, total: int, into: bytearray | None) -> None:
        """Read the frames of payload behind the head; `into` = None drops them."""
        with anyio.move_on_after(self.rest_timeout):
            while have < total:
                chunk = await self.stream.receive()
                have += len(chunk)
                if not chunk or have > total:
                    raise ProtocolError(
                        f"a payload of {total} bytes came in pieces that do not add up", self.peer_id
                    )
                if into is not None:
                    into += chunk
            return
        raise ProtocolError(
            f"only {have} of {total} bytes of a message came within {self.rest_timeout:g} s", self.peer_id
        )

    def _parse_head(self, frame: bytes) -> tuple[Message, int, memoryview]:
        if len(frame) < _HEAD.size:
            raise ProtocolError(f"a frame of {len(frame)} bytes is too short to be a message", self.peer_id)
        magic, version, header_bytes, total = _HEAD.unpack_from(frame)
        if magic != _MAGIC:
            raise ProtocolError("the bytes are not a swarmkit message", self.peer_id)
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"protocol version {version} is not {PROTOCOL_VERSION}; one of the two peers needs an update",
                self.peer_id,
            )
        if header_bytes > MAX_HEADER_BYTES or _HEAD.size + header_bytes > len(frame):
            raise ProtocolError(
                f"a message header of {header_bytes} bytes is too large or cut off", self.peer_id
            )
        try:
            message = self._decoder.decode(memoryview(frame)[_HEAD.size : _HEAD.size + header_bytes])
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"the message header is not valid: {error}", self.peer_id) from None
        expected = sum(spec.nbytes for spec in tensor_specs(message))
        if total != expected:
            raise ProtocolError(
                f"the message announces {expected} bytes of tensors but a payload of {total}", self.peer_id
            )
        if total > self.max_payload_bytes:
            raise MessageTooLargeError(
                f"{total} bytes of tensors are more than the {self.max_payload_bytes} allowed here; "
                "send fewer tokens at a time",
                self.peer_id,
            )
        body = memoryview(frame)[_HEAD.size + header_bytes :]
        if len(body) > total:
            raise ProtocolError("more payload than the message announces", self.peer_id)
        return message, total, body
