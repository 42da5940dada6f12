"""From server to server: a step's output goes straight to the server that has the next blocks.

Nothing is believed on either side: the next server checks what comes as it checks a client's steps, and the
client, which gets every output as well, can send it itself at any time.
"""

from __future__ import annotations

import msgspec

from swarmkit.errors import PeerError
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import Step
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.transport.seam import Buffer


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
