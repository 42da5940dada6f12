"""From server to server: a step's output goes straight to the server that has the next blocks.

Nothing is believed on either side: the next server checks what comes as it checks a client's steps, and the
client, which gets every output as well, can send it itself at any time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import msgspec

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import PeerError, RemoteError
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import PUSH, Attach, Attached, Link, Step
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.transport.seam import Buffer, Stream

Dial = Callable[[Link], Awaitable[Stream]]
"""`dial(link)`: a stream to the push endpoint of the service that a client has named."""

_DIALS_AT_A_TIME = 8
"""A client says which peers to dial; it shall not have this machine dial the world."""


class NotLinkedError(PeerError):
    """The next server cannot be reached, or does not know the session."""


class Downstream:
    """The way from one session to the next server's part of it."""

    def __init__(self, stream: ClientStream, timeout: float) -> None:
        self._stream = stream
        self._timeout = timeout

    async def push(self, step: Step, incoming: IncomingMessage, spec: TensorSpec, output: Buffer) -> bool:
        """Send the outputs of `step`, with its mask and positions. Returns whether they could be sent."""
        side = [incoming.raw(part) for part in (step.mask, step.positions) if part is not None]
        message = msgspec.structs.replace(
            step, hidden=spec, forward=step.forward - 1, answers=step.answers[1:]
        )
        try:
            with self._stream.within(self._timeout):
                await self._stream.send(message, [output, *side])
        except PeerError:
            return False
        return True

    def close(self) -> None:
        self._stream.close()


class Links:
    """Makes the ways to next servers."""

    def __init__(
        self,
        dial: Dial,
        link_timeout: float,
        message_timeout: float,
        now: Callable[[], float] = SYSTEM_CLOCK.now,
    ) -> None:
        """Prepare to link sessions.

        Args:
            link_timeout: seconds to reach the next server.
            message_timeout: seconds for the next server to take a step.
            now: seconds on this server's clock.
        """
        self._dial = dial
        self._link_timeout = link_timeout
        self._message_timeout = message_timeout
        self._now = now
        self._dials = anyio.Semaphore(_DIALS_AT_A_TIME)

    async def make(self, link: Link) -> Downstream:
        """Reach the next server's session.

        Raises:
            NotLinkedError: it does not answer, or knows no such session.
        """
        stream: ClientStream | None = None
        try:
            with anyio.fail_after(self._link_timeout):
                async with self._dials:
                    stream = ClientStream(await self._dial(link), PUSH, clock=self._now)
                    await stream.ask(Attach(link.inlet), Attached)
            downstream, stream = Downstream(stream, self._message_timeout), None
            return downstream
        except TimeoutError:
            raise NotLinkedError(f"the next server did not answer within {self._link_timeout:g} s") from None
        except RemoteError as error:
            raise NotLinkedError(f"the next server does not take this session's steps: {error}") from None
        except PeerError as error:
            raise NotLinkedError(f"the next server cannot be reached from here: {error}") from None
        finally:
            if stream is not None:
                stream.close()
