"""The other end of a stream to a server, and how it is talked to, whatever the talk is about."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from swarmkit.errors import ProtocolError
from swarmkit.net.protocol.messages import Fault, FaultCode, printable
from swarmkit.net.rpc.conversation import Conversation, Received
from swarmkit.net.rpc.idle_timer import IdleTimer
from swarmkit.net.transport.seam import Buffer
from swarmkit.server.sessions.session import Refusal, refusal_of
from swarmkit.settings import ServerSettings

logger = logging.getLogger(__name__)

_LINGER_S = 1.0


class Caller:
    """Who opened a stream. Who is silent for too long, or does not take what it is told, loses it."""

    def __init__(
        self,
        conversation: Conversation,
        settings: ServerSettings,
        too_large: FaultCode = "too_large",
    ) -> None:
        """Args: too_large: the fault of a message with more bytes than are taken here."""
        self.conversation = conversation
        self.number = 0
        """Of the step that its latest message is; 0 if it is none."""
        self.patience = IdleTimer(conversation)
        """With what it says."""
        self._taking = IdleTimer(conversation)
        """With how it takes what it is told."""
        self._too_large = too_large
        self._timeout = settings.requests.message_timeout_s
        self._sending = asyncio.Lock()

    @property
    def peer_id(self) -> str:
        return self.conversation.peer_id

    async def receive(
        self, admit: Callable[[Any], Awaitable[None]], seconds: float | None = None
    ) -> Received:
        """Its next message, which `admit` may refuse by the header alone.

        Args: seconds: for which it may be silent; as long as a message may take if not given.

        Raises:
            PeerError: it is gone, or was silent for longer.
            ProtocolError: what it says cannot be understood. Whatever `admit` raises is raised here too.
        """
        self.number = 0
        self.patience.start(self._timeout if seconds is None else seconds)
        try:
            return await self.conversation.receive(admit)
        finally:
            self.patience.stop()

    async def send(self, message: Any, *payload: Buffer) -> None:
        """Tell it something. Raises PeerError when it is gone, or does not take it in time."""
        async with self._sending:
            self._taking.start(self._timeout)
            try:
                await self.conversation.send(message, payload)
            finally:
                self._taking.stop()

    async def refuse(self, refusal: Refusal, number: int = 0) -> None:
        """Tell it why something, the step of that number if any, was not done."""
        text = printable(str(refusal))[:2000]  # it may quote what the peer sent
        logger.info("refused %s: %s (%s)", self.peer_id[-6:], text, refusal.code)
        await self.send(Fault(refusal.code, text, number, refusal.retry_after_s))

    async def answer_all(self, answer_next: Callable[[], Awaitable[None]]) -> None:
        """Have message after message answered, until the conversation cannot go on."""
        while await self._answered(answer_next):
            pass

    async def _answered(self, answer_next: Callable[[], Awaitable[None]]) -> bool:
        try:
            await answer_next()
            return True
        except (ProtocolError, Refusal) as error:
            refusal, goes_on = refusal_of(error, self._too_large)
        await self.refuse(refusal, self.number)
        return goes_on

    async def linger(self) -> None:
        """Let it read why the stream ends: closing while it still sends could discard that."""
        with anyio.move_on_after(_LINGER_S):
            while True:
                await self.conversation.stream.receive()

    def close(self) -> None:
        """May be called twice."""
        self.patience.close()
        self._taking.close()
        self.conversation.close()
