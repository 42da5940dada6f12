"""The asking side of a stream: requests go out, answers are checked to be of the kind that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import anyio
import msgspec

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import PeerError, PeerUnreachableError, ProtocolError, RemoteError
from swarmkit.net.protocol.messages import Fault
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.rpc.faults import error_of
from swarmkit.net.rpc.idle_timer import IdleTimer
from swarmkit.net.rpc.message_stream import IncomingMessage, MessageStream
from swarmkit.net.transport.seam import Buffer, Stream

Answer = TypeVar("Answer", bound=msgspec.Struct)

_LAST_WORDS_S = 1.0


class ClientStream(MessageStream):
    """A stream that this peer opened to another one.

    ::

        with stream.within(5.0):                      # PeerTimeoutError after five seconds
            opened = await stream.ask(Open(…), Opened)   # RemoteError if the answer is a fault
            await stream.send(Step(…), [data])
            incoming = await stream.receive()            # whatever comes, faults too
    """

    def __init__(
        self,
        stream: Stream,
        protocol: Protocol,
        max_payload_bytes: int = 0,
        rest_timeout: float = 60.0,
        clock: Callable[[], float] = SYSTEM_CLOCK.now,
    ) -> None:
        super().__init__(stream, protocol, max_payload_bytes, rest_timeout, clock)
        self._timer = IdleTimer(self)

    def within(self, seconds: float) -> IdleTimer:
        """A context manager: a deadline for all that is sent and received in it, after which the stream ends.

        The block raises PeerTimeoutError when the deadline has passed. Blocks do not nest.
        """
        return self._timer.within(seconds)

    def extend(self, seconds: float) -> None:
        """Inside `within`: move the deadline to so many seconds from now, since the peer makes progress."""
        self._timer.start(seconds)

    async def send(self, message: msgspec.Struct, payload: Sequence[Buffer] = ()) -> None:
        """Send a message; see `MessageStream.send`.

        Raises:
            RemoteError: the peer ended the stream, and had said why.
            PeerUnreachableError: the peer ended the stream or went away.
        """
        try:
            await MessageStream.send(self, message, payload)
        except PeerUnreachableError as error:
            raise await self._last_words() or error from None

    async def ask(
        self, message: msgspec.Struct, expected: type[Answer], payload: Sequence[Buffer] = ()
    ) -> Answer:
        """Send a message and return the answer to it, which has no tensors.

        Raises:
            RemoteError: the answer is a fault.
            ProtocolError: the answer is not of the expected type.
            PeerUnreachableError: the peer ended the stream or went away.
        """
        await self.send(message, payload)
        answer: Answer = (await self.answer(expected)).message
        return answer

    async def answer(self, expected: type[Answer]) -> IncomingMessage:
        """The next message with its payload, which must be of the expected type. Raises as `ask` does."""
        incoming = await self.receive()
        message = incoming.message
        if isinstance(message, Fault):
            raise error_of(message, self.peer_id)
        if not isinstance(message, expected):
            raise ProtocolError(
                f"expected {expected.__name__} as an answer, got {type(message).__name__}", self.peer_id
            )
        return incoming

    async def _last_words(self) -> RemoteError | None:
        """Why the peer ended the stream, if it said so before; a fault about one step does not tell that."""
        with anyio.move_on_after(_LAST_WORDS_S), suppress(PeerError):
            while True:
                message = (await self.next()).message
                if isinstance(message, Fault) and not message.number:
                    return error_of(message, self.peer_id)
        return None

    def close(self) -> None:
        """End the stream from this side. May be called twice."""
        self._timer.close()
        self.stream.close()
