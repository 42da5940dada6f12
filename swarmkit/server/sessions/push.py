"""From server to server: a step's output goes straight to whoever has the next blocks.

Nothing is believed on either side: the next server checks what comes as it checks a client's steps, and the
client, who gets every output as well, can send it itself at any time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import msgspec

from swarmkit.errors import PeerError
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import Attach, Attached, Fault, Link, Step
from swarmkit.net.rpc.conversation import Conversation, Received
from swarmkit.net.rpc.idle_timer import IdleTimer
from swarmkit.net.transport.seam import Buffer, Stream

Dial = Callable[[Link], Awaitable[Stream]]
"""`dial(link)`: a stream to the push endpoint of the service that a client has named."""

_DIALS_AT_A_TIME = 8
"""A client says whom to dial; nobody shall have this machine dial the world."""


class NotLinkedError(PeerError):
    """The next server cannot be reached, or does not know the session."""


class Downstream:
    """The way from one session to the next server's part of it."""

    def __init__(self, conversation: Conversation, timeout: float) -> None:
        self._conversation = conversation
        self._patience = IdleTimer(conversation)
        self._timeout = timeout

    async def push(self, step: Step, received: Received, spec: TensorSpec, output: Buffer) -> bool:
        """Send the outputs of `step`, with what came along with it. Returns whether they went."""
        side = [received.raw(part) for part in (step.mask, step.positions) if part is not None]
        message = msgspec.structs.replace(
            step,
            hidden=spec,
            forward=step.forward - 1,
            answers=step.answers[1:],
            sent_at=self._conversation.clock(),
        )
        self._patience.start(self._timeout)
        try:
            await self._conversation.send(message, [output, *side])
        except PeerError:
            return False
        finally:
            self._patience.stop()
        return True

    def close(self) -> None:
        self._patience.close()
        self._conversation.close()


class Links:
    """Makes the ways to next servers."""

    def __init__(self, dial: Dial, link_timeout: float, message_timeout: float) -> None:
        """Args: link_timeout: seconds to reach the next server; message_timeout: for it to take a step."""
        self._dial = dial
        self._link_timeout = link_timeout
        self._message_timeout = message_timeout
        self._dials = anyio.Semaphore(_DIALS_AT_A_TIME)

    async def make(self, link: Link) -> Downstream:
        """Reach the next server's session.

        Raises:
            NotLinkedError: it does not answer, or knows no such session.
        """
        conversation: Conversation | None = None
        try:
            with anyio.fail_after(self._link_timeout):
                async with self._dials:
                    conversation = Conversation(await self._dial(link), 0)
                    await conversation.send(Attach(link.inlet, conversation.clock()))
                    reply = (await conversation.receive()).message
            if not isinstance(reply, Attached):
                said = reply.message if isinstance(reply, Fault) else type(reply).__name__
                raise NotLinkedError(f"the next server does not take this session's steps: {said}")
            downstream = Downstream(conversation, self._message_timeout)
            conversation = None
            return downstream
        except TimeoutError:
            raise NotLinkedError(f"the next server did not answer within {self._link_timeout:g} s") from None
        except NotLinkedError:
            raise
        except PeerError as error:
            raise NotLinkedError(f"the next server cannot be reached from here: {error}") from None
        finally:
            if conversation is not None:
                conversation.close()
