"""Numbered requests and their answers over one stream to a stage's server; has no history."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from swarmkit.errors import PeerError, ProtocolError, RemoteError
from swarmkit.net.protocol.messages import HIDDEN_DTYPES, Fault, Message, Opened, StepDone, Unlinked
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.faults import error_of
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.transport.seam import Buffer


class NotPushedError(PeerError):
    """What the previous server should have pushed did not come, or was wrong: this server is not at fault."""


class StageConnection:
    """One stream to a server, which answers requests in the order in which they come.

    Steps have a number, and so have their answers and the faults about them; other requests have none, and
    one of them at a time waits for its answer. Answers to steps that were given up are dropped.
    """

    def __init__(self, stream: ClientStream) -> None:
        self._stream = stream
        self._given_up: set[int] = set()
        self.opened: Opened | None = None
        """What the server said of the session that this stream carries; None until it is open."""
        self.is_asking = False
        """Whether a request without a number has no answer yet."""
        self.is_dismissed = False
        """Whether the server has ended the session and given the reason."""

    @property
    def peer_id(self) -> str:
        return self._stream.peer_id

    @property
    def in_message(self) -> bool:
        """Whether an answer has come in part: to stop receiving now would lose it."""
        return self._stream.in_message

    @property
    def bytes_per_s(self) -> float | None:
        """What the link from the server carries, as far as it was measured."""
        return self._stream.speed.bytes_per_s

    @property
    def dtype(self) -> str:
        """The type that the server computes in, as far as it is known."""
        known = self.opened is not None and self.opened.dtype in HIDDEN_DTYPES
        return self.opened.dtype if known and self.opened is not None else HIDDEN_DTYPES[0]

    def close(self) -> None:
        """End the stream, and with it the session at the server. May be called twice."""
        self._stream.close()

    def give_up(self, numbers: Iterable[int]) -> None:
        """Drop the answers to these steps when they come."""
        self._given_up.update(numbers)

    async def ask(self, message: Message, timeout_s: float) -> Message:
        """Send a request without tensors, and wait for the answer to it.

        Raises:
            RemoteError: the server refuses.
            PeerError: it cannot be reached, or does not answer in time.
        """
        self.is_asking = True
        try:
            with self._stream.within(timeout_s):
                await self._stream.send(message)
            reply = (await self.receive(0, timeout_s, 0)).message
        except RemoteError:
            self.is_asking = False
            raise
        self.is_asking = False
        return reply

    async def send(self, message: Message, payload: Sequence[Buffer], timeout_s: float) -> None:
        """Send a step.

        Raises:
            RemoteError: the server had ended the stream, for this reason.
            PeerError: it cannot be reached, or does not take the message in time.
        """
        try:
            with self._stream.within(timeout_s):
                await self._stream.send(message, payload)
        except RemoteError:
            self.is_dismissed = True
            raise

    async def receive(
        self, number: int, timeout_s: float, max_payload_bytes: int, is_pushed: bool = False
    ) -> IncomingMessage:
        """The answer of this number; 0 = the answer to `ask`.

        Args: is_pushed: the previous server was to push this step.

        Raises:
            NotPushedError: the step did not come, or was wrong.
            RemoteError: the server could not do it.
            ProtocolError: another answer came in its place.
            PeerTimeoutError: nothing came in time.
        """
        stream = self._stream
        # An answer that was given up may be as large as any before.
        stream.max_payload_bytes = max(stream.max_payload_bytes, max_payload_bytes)
        with self._stream.within(timeout_s):
            while True:
                received = await stream.receive()
                message = received.message
                answered = number
                if isinstance(message, Unlinked):
                    if is_pushed and message.number < number:
                        raise NotPushedError("the previous server pushes no more", self.peer_id)
                    continue
                if isinstance(message, StepDone):
                    answered = message.number
                elif isinstance(message, Fault):
                    answered = message.number or number
                if answered in self._given_up:
                    self._given_up.discard(answered)
                    continue
                if isinstance(message, Fault):
                    if is_pushed and message.code == "upstream":
                        raise NotPushedError(message.message, self.peer_id)
                    if not message.number and number:
                        self.is_dismissed = True  # the fault is about the session, not about the step
                    raise error_of(message, self.peer_id)
                if is_pushed and answered > number:
                    raise NotPushedError(f"request {number} was not pushed to it", self.peer_id)
                if answered != number:
                    raise ProtocolError(f"answer {answered} came in the place of {number}", self.peer_id)
                if self._given_up:  # answers come in order
                    self._given_up = {other for other in self._given_up if other > number}
                return received
