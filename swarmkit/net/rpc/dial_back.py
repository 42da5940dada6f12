"""Dialling a peer back, so that it learns whether it can be reached from outside its own network."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import anyio

from swarmkit.net.protocol.reach_messages import REACH, DialBack, DialedBack
from swarmkit.net.rpc.endpoints import connect
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.transport.dialling import may_dial
from swarmkit.net.transport.seam import Stream, Transport

DIAL_TIMEOUT_S = 3.0
"""For so long a peer is dialled, and so late is the answer that it was not reached."""
_MESSAGE_TIMEOUT_S = 10.0
MOST_AT_A_TIME = 4
"""Peers that are dialled at the same time; others are told to ask elsewhere."""


class DialBackService:
    """Answers peers that ask to be dialled back.

    What is dialled is the host that the transport has seen the peer come from, at a port that the peer names.
    So a peer has nobody dialled but itself, and learns of a failure neither the kind nor when it came.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._dialling = 0

    async def start(self) -> None:
        """Serve such streams from now on, until the transport is closed."""
        await self._transport.listen(REACH.endpoint, self.serve)

    async def serve(self, stream: Stream) -> None:
        """Answer one peer."""
        asking = ServerStream(stream, REACH, max_payload_bytes=0, message_timeout=_MESSAGE_TIMEOUT_S)

        async def answer(incoming: IncomingMessage) -> None:
            assert isinstance(incoming.message, DialBack)
            host = self._host_of(stream)
            await asking.send(DialedBack(await self._dial(host, incoming.message.port), host))

        await asking.serve(answer)

    def _host_of(self, stream: Stream) -> str:
        """Where a peer comes from, if that may be dialled."""
        version = "ip6" if ":" in stream.host else "ip4"
        address = f"/{version}/{stream.host}/tcp/1"
        return stream.host if stream.host and may_dial([address], self._transport.addresses) else ""

    async def _dial(self, host: str, port: int) -> bool:
        if self._dialling >= MOST_AT_A_TIME:
            raise Refusal("busy", "too many peers are being dialled back; ask another one", retry_after_s=5.0)
        self._dialling += 1
        try:
            with anyio.move_on_after(DIAL_TIMEOUT_S):
                with suppress(OSError):
                    if host:
                        _, writer = await asyncio.open_connection(host, port)
                        writer.close()
                        return True
                await anyio.sleep(DIAL_TIMEOUT_S)  # a failure tells nothing by its time
        finally:
            self._dialling -= 1
        return False


async def ask_to_dial_back(
    transport: Transport, peer_id: str, addresses: Sequence[str], port: int, timeout: float
) -> DialedBack:
    """Have a peer dial this one back.

    Raises:
        PeerError: it cannot be reached, or does not do this.
    """
    stream = await connect(transport, REACH, peer_id, addresses, timeout)
    try:
        with stream.within(timeout):
            return await stream.ask(DialBack(port), DialedBack)
    finally:
        stream.close()
