"""Frames over a local socket: a 4-byte big-endian length, then that many bytes.

This is an asyncio *protocol* rather than a reader and a writer: a frame is cut out of the bytes as they
arrive and wakes its reader once, which costs a token step one task switch instead of three. Memory is
bounded: a length above the limit ends the stream before any of its bytes are taken, and a peer that sends
faster than it is read is no longer read from.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from swarmkit.errors import PeerUnreachableError, ProtocolError, SwarmkitError, UsageError
from swarmkit.net.transport.limits import frame_too_large
from swarmkit.net.transport.rates import Rates
from swarmkit.net.transport.seam import MAX_FRAME_BYTES, Buffer

_HEADER_BYTES = 4
_JOIN_BELOW = 128 * 1024  # up to here one copy is cheaper than a second system call
_PAUSE_ABOVE = 256 * 1024  # bytes that wait for `receive` before reading is paused
_GATHER_BELOW = 16 * 1024  # smaller pieces of a frame are gathered, lest they take far more than their bytes
_FRAME_COST = 64  # what even an empty frame counts, lest a flood of them take memory without end
_MAX_GREETING_BYTES = 64 * 1024
_MAX_GREETING_LENGTH_BYTES = 4


class _Pieces:
    """What has come of something, piece after piece. A large piece is copied once, when it is whole."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._pieces: list[memoryview | bytearray] = []

    def add(self, piece: memoryview) -> None:
        """Keep a piece, which must not change."""
        self.nbytes += piece.nbytes
        if piece.nbytes >= _GATHER_BELOW:
            self._pieces.append(piece)
        elif self._pieces and isinstance(last := self._pieces[-1], bytearray):
            last += piece
        else:
            self._pieces.append(bytearray(piece))

    def take(self) -> bytes:
        """All of it; nothing is left."""
        whole = b"".join(self._pieces)
        self._pieces.clear()
        self.nbytes = 0
        return whole


class FrameStream(asyncio.Protocol):
    """A `Stream` over one socket.

    With `greeting=True` the socket begins, in the incoming direction, with one message of another format
    (a varint length and its bytes, as the p2p daemon speaks), which `greeting()` returns.

    Attributes:
        frame_limit: bytes of the largest frame that is taken.
        overhead: how many bytes `outgoing` adds to a frame.
    """

    def __init__(
        self,
        *,
        greeting: bool = False,
        on_connected: Callable[[FrameStream], None] | None = None,
    ) -> None:
        self.peer_id = ""
        self.host = ""
        self.rates: Rates | None = None
        self.frame_limit = MAX_FRAME_BYTES
        self.overhead = 0
        self._on_connected = on_connected
        self._transport: asyncio.Transport | None = None
        self._in_greeting = greeting
        self._greeting = bytearray()
        self._partial = _Pieces()
        self._needed: int | None = None  # bytes of the frame that is being received; None = in its header
        self._frames: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._reading_paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._writers: deque[asyncio.Future[None]] = deque()
        self._end: SwarmkitError | None = None  # why nothing more comes or goes
        self._on_end: Callable[[], object] | None = None

    # what callers use

    async def send(self, *parts: Buffer) -> None:
        """Send one frame; see `Stream.send`. The parts must not change until this returns."""
        size = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
        if size > MAX_FRAME_BYTES:
            raise frame_too_large(size)
        if (rates := self.rates) is not None:
            rates.traffic.sent_bytes += size
            if (bucket := rates.upload) is not None:
                await rates.wait(bucket, size)
        if self._end is not None:
            raise self._fresh_end()
        assert self._transport is not None
        header = (size + self.overhead).to_bytes(_HEADER_BYTES, "big")
        parts = self.outgoing(parts)
        if size <= _JOIN_BELOW:
            self._transport.write(b"".join((header, *parts)))
        else:
            self._write_large(header, parts)
        if self._writing_paused:
            # wait until all of it has left for the kernel: this is the backpressure, and it lets parts be
            # sent from where they lie in memory
            waiter = asyncio.get_running_loop().create_future()
            self._writers.append(waiter)
            try:
                await waiter
            finally:
                self._writers.remove(waiter)
            if self._end is not None:
                raise self._fresh_end()

    async def receive(self) -> bytes:
        """The next frame; see `Stream.receive`."""
        while not self._frames:
            if self._end is not None:
                raise self._fresh_end()
            self._resume_reading()
            await self._wait()
        frame = self._frames.popleft()
        self._waiting_bytes -= len(frame) + _FRAME_COST
        if self._waiting_bytes <= _PAUSE_ABOVE // 2:
            self._resume_reading()
        if (rates := self.rates) is not None:
            rates.traffic.received_bytes += len(frame)
            if (bucket := rates.download) is not None:
                # To hold the frame back keeps the next ones from being read, and so slows the sender.
                await rates.wait(bucket, len(frame))
        return frame

    def on_end(self, call: Callable[[], object]) -> None:
        """See `Stream.on_end`."""
        self._on_end = call
        if self._end is not None:
            self._tell_end()

    def close(self) -> None:
        """End the conversation from this side, after what has been sent. May be called twice."""
        self._frames.clear()
        self._finish(PeerUnreachableError("the stream was closed on this side", self.peer_id))
        if self._transport is not None:
            self._transport.close()

    def abort(self, why: SwarmkitError) -> None:
        """End the conversation at once; frames that were not read yet are dropped."""
        self._frames.clear()
        self._waiting_bytes = 0
        self._end = None
        self._finish(why)
        if self._transport is not None:
            self._transport.abort()

    async def greeting(self) -> bytes:
        """The message with which the socket began.

        Raises:
            PeerUnreachableError: the socket ended before it.
        """
        while self._in_greeting or not self._frames:
            if self._end is not None:
                raise self._fresh_end()
            await self._wait()
        return self._frames.popleft()

    def write_greeting(self, message: bytes) -> None:
        """Begin the outgoing direction with a message in the other format."""
        assert self._transport is not None
        length, remaining = bytearray(), len(message)
        while remaining > 0x7F:
            length.append(remaining & 0x7F | 0x80)
            remaining >>= 7
        length.append(remaining)
        self._transport.write(bytes(length) + message)

    # what another kind of stream may do to its frames

    def outgoing(self, parts: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
        """A frame as it goes over the socket."""
        return parts

    def incoming(self, frame: bytes) -> bytes:
        """What `outgoing` was given at the other end.

        Raises:
            ProtocolError: it was given nothing such.
        """
        return frame

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes or goes."""
        return self._end is not None

    @property
    def nothing_waits(self) -> bool:
        """Whether all that came has been received."""
        return not self._frames and not self._partial.nbytes and self._needed is None

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: other event loops' transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)
        if self._on_connected is not None:
            self._on_connected(self)

    def data_received(self, data: bytes) -> None:
        if self._end is not None:
            return
        view = memoryview(data)
        if self._in_greeting:
            self._greeting += view
            view = self._take_greeting()
        position = 0
        while not self._in_greeting:
            wanted = _HEADER_BYTES if self._needed is None else self._needed
            taken = min(wanted - self._partial.nbytes, len(view) - position)
            piece = view[position : position + taken]
            position += taken
            if self._partial.nbytes or taken < wanted:
                self._partial.add(piece)
                if self._partial.nbytes < wanted:
                    if self._reader is None and self._partial.nbytes > _PAUSE_ABOVE:
                        self._pause_reading()
                    return
                whole = self._partial.take()
            else:
                whole = bytes(piece)
            if self._needed is not None:
                self._needed = None
                try:
                    self._push(self.incoming(whole))
                except ProtocolError as error:
                    self._refuse(error)
                    return
                continue
            self._needed = int.from_bytes(whole, "big")
            if self._needed > self.frame_limit:
                self._refuse(
                    ProtocolError(
                        f"peer {self.peer_id} announced a frame of {self._needed} bytes; "
                        f"{self.frame_limit} are allowed, so the stream was ended",
                        self.peer_id,
                    )
                )
                return

    def eof_received(self) -> bool:
        self._finish(PeerUnreachableError(f"peer {self.peer_id} ended the stream", self.peer_id))
        return False

    def connection_lost(self, error: Exception | None) -> None:
        why = f"the connection to peer {self.peer_id} was lost" + (f": {error}" if error else "")
        self._finish(PeerUnreachableError(why, self.peer_id))
        self._transport = None  # asyncio's has nothing left that could be ended

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake_writers()

    # the rest

    def _refuse(self, why: ProtocolError) -> None:
        """Take nothing more of what the peer sends."""
        self._finish(why)
        assert self._transport is not None
        self._transport.abort()

    def _write_large(self, header: bytes, parts: tuple[Buffer, ...]) -> None:
        assert self._transport is not None
        lead = header  # a header of its own would be a packet of its own
        for part in parts:
            view = memoryview(part).cast("B")
            if view.nbytes < _JOIN_BELOW:
                lead += view
                continue
            if lead:
                lead += view[:_JOIN_BELOW]
                view = view[_JOIN_BELOW:]
                self._transport.write(lead)
                lead = b""
            self._transport.write(view)
        if lead:
            self._transport.write(lead)

    def _take_greeting(self) -> memoryview[Any]:
        """Cut the greeting from what has come; returns the bytes behind it."""
        length = 0
        for index, byte in enumerate(self._greeting[:_MAX_GREETING_LENGTH_BYTES]):
            length |= (byte & 0x7F) << (7 * index)
            if byte & 0x80:
                continue
            if length > _MAX_GREETING_BYTES:
                break
            start, end = index + 1, index + 1 + length
            if len(self._greeting) < end:
                return memoryview(b"")
            greeting, rest = bytes(self._greeting[start:end]), bytes(self._greeting[end:])
            self._greeting.clear()
            self._frames.append(greeting)
            self._in_greeting = False
            self._wake_reader()
            return memoryview(rest)
        else:
            if len(self._greeting) < _MAX_GREETING_LENGTH_BYTES:
                return memoryview(b"")
        self.abort(ProtocolError("the p2p daemon's message makes no sense; restart this peer"))
        return memoryview(b"")

    def _push(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._waiting_bytes += len(frame) + _FRAME_COST
        if self._waiting_bytes > _PAUSE_ABOVE:
            self._pause_reading()
        self._wake_reader()

    def _pause_reading(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            assert self._transport is not None
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused and self._end is None:
            self._reading_paused = False
            assert self._transport is not None
            self._transport.resume_reading()

    async def _wait(self) -> None:
        if self._reader is not None:
            raise UsageError("two tasks receive from one stream; let one of them hand frames to the other")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _finish(self, why: SwarmkitError) -> None:
        if self._end is None:
            self._end = why
        self._wake_reader()
        self._wake_writers()
        self._tell_end()

    def _tell_end(self) -> None:
        call, self._on_end = self._on_end, None
        if call is not None:
            call()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_writers(self) -> None:
        for waiter in self._writers:
            if not waiter.done():
                waiter.set_result(None)

    def _fresh_end(self) -> SwarmkitError:
        """A new instance each time: one exception raised twice would gather tracebacks."""
        assert self._end is not None
        if isinstance(self._end, PeerUnreachableError | ProtocolError):
            return type(self._end)(str(self._end), self._end.peer_id)
        return type(self._end)(str(self._end))
