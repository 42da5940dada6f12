"""Messages over a stream: versioned headers, tensors in chunks, sizes checked before memory is spent.

A message is one head frame and, where its tensors do not fit beside the head, more frames of payload::

    head frame:   head | header (msgpack) | payload…
    more frames:  payload…                                          (each at most CHUNK_BYTES)
    head:         "SK" | version u8 | header bytes u32 | payload bytes u64 | sent at f64

`sent at` is in seconds on the sender's clock, which begins with the stream; 0 = it does not say. The first
three bytes are the same in every version, so that peers of different versions can name the difference.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import msgspec
import torch

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import MessageTooLargeError, ProtocolError, UsageError
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.link_speed import LinkSpeed
from swarmkit.net.protocol.messages import tensor_specs
from swarmkit.net.protocol.protocol import OWN_VERSIONS, PROTOCOL_VERSION, Protocol, version_mismatch
from swarmkit.net.transport.seam import MAX_FRAME_BYTES, Buffer, Stream
from swarmkit.net.transport.shares import Holder

MAX_HEADER_BYTES = 64 * 1024
CHUNK_BYTES = 1024 * 1024
"""Payload frames are smaller than the limit, so that other streams of the connection get their turn."""

HEAD = struct.Struct(">2sBIQd")
"""Magic, version, bytes of the header, bytes of the payload, and when the message was sent."""
MAGIC = b"SK"
_MAX_SENT_AT_S = 1e12
_encoder = msgspec.msgpack.Encoder()

assert CHUNK_BYTES + MAX_HEADER_BYTES + HEAD.size < MAX_FRAME_BYTES


class IncomingMessage:
    """A message whose header has come. Its tensors are there after `payload`, and decoded when asked for.

    What is not taken is dropped by the stream before it receives the next message.
    """

    __slots__ = (
        "_body",
        "_have",
        "_owned",
        "_payload",
        "_stream",
        "_waiting_from",
        "message",
        "nbytes",
        "sent_at",
    )

    def __init__(
        self,
        stream: MessageStream,
        message: Any,
        nbytes: int,
        body: memoryview,
        sent_at: float = 0.0,
        waiting_from: float = 0.0,
    ) -> None:
        self.message = message
        self.nbytes = nbytes
        """Bytes of all tensors."""
        self.sent_at = sent_at
        self._stream = stream
        self._body = body
        self._have = len(body)
        self._payload = body if self._have == nbytes else None
        self._owned = False
        self._waiting_from = waiting_from

    async def payload(self, into: bytearray | memoryview | None = None) -> IncomingMessage:
        """Receive the tensors' bytes, and return this message.

        Args:
            into: a writable buffer of exactly `nbytes`. The tensors are then views of it, without a copy.

        Raises:
            UsageError: the buffer's size is not the payload's.
            ProtocolError: the bytes do not come in time, or are not as many as were announced.
            PeerUnreachableError: the peer ended the stream or went away.
        """
        if into is None and self._payload is not None:
            return self
        buffer = memoryview(bytearray(self.nbytes) if into is None else into).cast("B")
        if buffer.nbytes != self.nbytes:
            raise UsageError(f"a payload of {self.nbytes} bytes does not fit a buffer of {buffer.nbytes}")
        body = self._body if self._payload is None else self._payload
        buffer[: len(body)] = body
        if self._payload is None:
            await self._stream._read_rest(self, buffer)
        self._payload = buffer
        self._owned = True
        return self

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor that belongs to `spec`, which must be the very object in the message.

        Tensors of a message that came in several frames, or into a given buffer, share its memory.

        Raises:
            UsageError: the spec is another message's, or `payload` was not called.
        """
        return codec.decode(spec, self.raw(spec), owned=self._owned)

    def raw(self, spec: TensorSpec) -> memoryview:
        """The bytes of that tensor."""
        if self._payload is None:
            raise UsageError("the tensors have not been received; await payload() first")
        offset = 0
        for other in tensor_specs(self.message):
            if other is spec:
                return self._payload[offset : offset + spec.nbytes]
            offset += other.nbytes
        raise UsageError("the spec is not one of this message's own")


class MessageStream:
    """Messages of one protocol over one stream, with limits on what the peer may send.

    Attributes:
        max_payload_bytes: the tensors of one message may have so many bytes.
        speed: what the way from the peer carries, measured on the messages that came.
        version: of what is sent. Once, it may become that of what the peer sends, if `may_follow`.
    """

    versions = OWN_VERSIONS

    def __init__(
        self,
        stream: Stream,
        protocol: Protocol,
        max_payload_bytes: int = 0,
        rest_timeout: float = 60.0,
        clock: Callable[[], float] = SYSTEM_CLOCK.now,
    ) -> None:
        """Args:
        rest_timeout: seconds within which a message that has begun must be complete, so that no peer can
            make this side hold half a message for long.
        clock: seconds, from any beginning.
        """
        self.stream = stream
        self.version, self.may_follow = PROTOCOL_VERSION, False
        self.protocol = protocol
        self.max_payload_bytes = max_payload_bytes
        self.speed = LinkSpeed()
        self._rest_timeout = rest_timeout
        self._clock = clock
        self._began_at = clock()
        self._decode = protocol.decoder.decode
        self._unread: IncomingMessage | None = None

    @property
    def peer_id(self) -> str:
        """The authenticated peer at the other end."""
        return self.stream.peer_id

    @property
    def holder(self) -> Holder:
        """The peer, as it has a share of what this one has."""
        return Holder(self.stream.host, self.stream.peer_id)

    @property
    def in_message(self) -> bool:
        """Whether a message has come in part: to stop receiving now would lose it."""
        return self._unread is not None

    async def send(self, message: msgspec.Struct, payload: Sequence[Buffer] = ()) -> None:
        """Send a message; `payload` holds the bytes of its tensors, in the order of its fields.

        Raises:
            UsageError: the payload's size is not what the message's specs say.
            PeerUnreachableError: the stream has ended.
        """
        header = _encoder.encode(message)
        parts = [memoryview(part).cast("B") for part in payload]
        total = sum(part.nbytes for part in parts)
        expected = sum(spec.nbytes for spec in tensor_specs(message))
        if total != expected:
            raise UsageError(f"the message announces {expected} bytes of tensors but comes with {total}")
        sent_at = self._clock() - self._began_at
        head = HEAD.pack(MAGIC, self.version, len(header), total, sent_at) + header
        if total <= CHUNK_BYTES:
            await self.stream.send(head, *parts)
            return
        await self.stream.send(head)
        for part in parts:
            for offset in range(0, part.nbytes, CHUNK_BYTES):
                await self.stream.send(part[offset : offset + CHUNK_BYTES])

    async def next(self) -> IncomingMessage:
        """The next message, as soon as its header has come. What was left of the one before is dropped.

        Raises:
            MessageTooLargeError: it is larger than this side allows.
            ProtocolError: it is not a message of this protocol and version.
            PeerUnreachableError: the peer ended the stream or went away.
        """
        if self._unread is not None:
            await self._read_rest(self._unread, None)
        waiting_from = self._clock()
        incoming = self._parsed(await self.stream.receive(), waiting_from)
        if incoming._payload is None:
            self._unread = incoming
        else:
            self._observe(incoming)
        return incoming

    async def receive(self) -> IncomingMessage:
        """The next message with its payload. Raises as `next` and `IncomingMessage.payload` do."""
        return await (await self.next()).payload()

    def close(self) -> None:
        """End the stream from this side. May be called twice."""
        self.stream.close()

    async def _read_rest(self, incoming: IncomingMessage, into: memoryview | None) -> None:
        """Read the frames of payload behind the head; `into` = None drops them."""
        total = incoming.nbytes
        with anyio.move_on_after(self._rest_timeout):
            while (have := incoming._have) < total:
                chunk = await self.stream.receive()
                end = have + len(chunk)
                if not chunk or end > total:
                    raise ProtocolError(
                        f"a payload of {total} bytes came in pieces that do not add up", self.peer_id
                    )
                if into is not None:
                    into[have:end] = chunk
                incoming._have = end
            self._unread = None
            self._observe(incoming)
            return
        raise ProtocolError(
            f"only {incoming._have} of {total} bytes of a message came within {self._rest_timeout:g} s",
            self.peer_id,
        )

    def _observe(self, incoming: IncomingMessage) -> None:
        if incoming.sent_at:
            self.speed.observe(incoming.nbytes, incoming.sent_at, self._clock(), incoming._waiting_from)

    def _parsed(self, frame: bytes, waiting_from: float) -> IncomingMessage:
        if frame[:2] == MAGIC and len(frame) > 2 and frame[2] != self.version:
            if not self.may_follow or self.versions.shared_with((frame[2], frame[2])) is None:
                raise ProtocolError(version_mismatch(frame[2], self.versions), self.peer_id)
            self.version, self.may_follow = frame[2], False
        if len(frame) < HEAD.size:
            raise ProtocolError(f"a frame of {len(frame)} bytes is too short to be a message", self.peer_id)
        magic, _, header_bytes, total, sent_at = HEAD.unpack_from(frame)
        if magic != MAGIC:
            raise ProtocolError("the bytes are not a swarmkit message", self.peer_id)
        body_at = HEAD.size + header_bytes
        if header_bytes > MAX_HEADER_BYTES or body_at > len(frame):
            raise ProtocolError(
                f"a message header of {header_bytes} bytes is too large or cut off", self.peer_id
            )
        if not 0.0 <= sent_at <= _MAX_SENT_AT_S:  # which NaN is not
            raise ProtocolError(f"a message cannot have been sent at {sent_at} s", self.peer_id)
        view = memoryview(frame)
        try:
            message = self._decode(view[HEAD.size : body_at])
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
        if len(frame) - body_at > total:
            raise ProtocolError("more payload than the message announces", self.peer_id)
        return IncomingMessage(self, message, total, view[body_at:], sent_at, waiting_from)
