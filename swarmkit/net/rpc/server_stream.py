"""The serving side of a stream: requests come in, each is answered or refused, and none waits for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import anyio
import msgspec

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import PeerError
from swarmkit.net.protocol.messages import FATAL, Fault, FaultCode
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.rpc.faults import Refusal, fault_of, refusal_of
from swarmkit.net.rpc.idle_timer import IdleTimer
from swarmkit.net.rpc.message_stream import IncomingMessage, MessageStream
from swarmkit.net.transport.rates import PeerRates
from swarmkit.net.transport.seam import Buffer, Stream

logger = logging.getLogger(__name__)

LINGER_S = 1.0
"""For so long a peer may read why its stream ends."""
LINGER_BYTES = 4 * 1024 * 1024
"""So much of what it has still sent meanwhile is read and dropped: about what may have been under way."""

_FRAME_COST = 64
"""What even an empty frame counts."""


class ServerStream(MessageStream):
    """A stream that a peer opened to this one.

    A peer that is silent for too long, or does not take its answers, loses the stream.

    Attributes:
        state: of the protocol. It advances when a request is answered with anything but a fault.
        idle_s: seconds for which the peer may send nothing between two messages.
        number: the number of the step that the latest message is; 0 if it is none. A service sets it, and
            the fault repeats it if that message is refused.
    """

    def __init__(
        self,
        stream: Stream,
        protocol: Protocol,
        *,
        max_payload_bytes: int,
        message_timeout: float,
        too_large: FaultCode = "too_large",
        clock: Callable[[], float] = SYSTEM_CLOCK.now,
    ) -> None:
        """Args:
        message_timeout: seconds for the rest of a message that has begun, and for the peer to take an answer.
        too_large: the code of the fault for a message with more bytes than `max_payload_bytes`.
        """
        super().__init__(stream, protocol, max_payload_bytes, message_timeout, clock)
        self.may_follow = True
        self.state = protocol.first
        self.idle_s = message_timeout
        self.number = 0
        self._following = protocol.first
        self._too_large = too_large
        self._timeout = message_timeout
        self._idle = IdleTimer(self)
        self._taking = IdleTimer(self)
        self._sending = asyncio.Lock()
        self.life = anyio.CancelScope()
        """Around all that is done for the peer: cancelled when it is gone, whatever runs then."""
        self.dropping: PeerRates | None = None
        """How fast what it sends in vain is read, of all streams of its host together; None: at any rate."""
        self._dismissal: Refusal | None = None

    async def next(self) -> IncomingMessage:
        """The next message, which is legal in the present state; see `MessageStream.next`.

        Raises:
            IllegalMessageError: it is not.
        """
        self.number = 0
        self._idle.start(self.idle_s)
        try:
            incoming = await MessageStream.next(self)
        finally:
            self._idle.stop()
        following = self.protocol.legal[self.state].get(type(incoming.message))
        if following is None:
            raise self.protocol.illegal(self.state, incoming.message)
        self._following = following
        return incoming

    async def send(self, message: msgspec.Struct, payload: Sequence[Buffer] = ()) -> None:
        """Answer the peer. May be called by several tasks.

        Raises:
            PeerUnreachableError: the peer is gone, or does not take the answer in time.
        """
        async with self._sending:
            self._taking.start(self._timeout)
            try:
                await MessageStream.send(self, message, payload)
            finally:
                self._taking.stop()
        if type(message) is not Fault:
            self.state = self._following

    async def refuse(self, refusal: Refusal, number: int = 0) -> None:
        """Tell the peer why a request, the step of that number if any, was not done."""
        fault = fault_of(refusal, number)
        logger.info("refused %s: %s (%s)", self.peer_id[-6:], fault.message, fault.code)
        await self.send(fault)

    def keep_alive(self) -> None:
        """Let the peer be silent for `idle_s` from now on: it is known to be there."""
        self._idle.start(self.idle_s)

    async def answer_all(self, answer: Callable[[IncomingMessage], Awaitable[None]]) -> None:
        """Have message after message answered, or refused where `answer` raises, while the stream can go on.

        Raises:
            PeerError: the peer is gone.
        """
        while True:
            try:
                await answer(await self.next())
                continue
            except Exception as error:  # noqa: BLE001 - `refusal_of` raises what is not to be answered
                refusal = refusal_of(error, self._too_large)
                goes_on = isinstance(error, Refusal) and refusal.code not in FATAL
            await self.refuse(refusal, self.number)
            if not goes_on:
                return

    async def serve(
        self, answer: Callable[[IncomingMessage], Awaitable[None]], refusal: Refusal | None = None
    ) -> None:
        """Serve the stream until it ends. Never raises on account of the peer.

        If the peer is gone, an answer that is being made is cancelled.

        Args:
            refusal: what the peer is told instead of being served, such as that there are too many streams.
        """
        self.stream.on_end(self.life.cancel)
        try:
            with self.life:
                if refusal is None:
                    await self.answer_all(answer)
                else:
                    await self.refuse(refusal)
            if self._dismissal is not None:
                await self.refuse(self._dismissal)
            await self.linger()
        except (PeerError, TimeoutError) as error:
            logger.debug("a stream of %s ended: %s", self.peer_id[-6:], error)
        finally:
            self.close()

    def dismiss(self, why: Refusal) -> None:
        """Serve the stream no longer: cancel the answer that is being made, and tell the peer why."""
        self._dismissal = why
        self.life.cancel()

    async def linger(self) -> None:
        """Let the peer read why the stream ends: closing it while the peer still sends could discard that.

        A peer that goes on sending all the same is not read from for long, and one whose streams are refused
        again and again is hardly read from, lest it hold up others' messages.
        """
        host, dropped = self.holder.host or self.peer_id, 0
        with anyio.move_on_after(LINGER_S):
            while dropped < LINGER_BYTES:
                if self.dropping is not None:
                    await anyio.sleep(self.dropping.take(host, 0))
                size = _FRAME_COST + len(await self.stream.receive())
                dropped += size
                if self.dropping is not None:
                    self.dropping.take(host, size)

    def close(self) -> None:
        """End the stream. May be called twice."""
        self._idle.close()
        self._taking.close()
        self.stream.close()
