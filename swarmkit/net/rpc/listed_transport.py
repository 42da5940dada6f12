"""What keeps the streams of a whole peer, and of a client or a server in it, to those that lists admit."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from swarmkit.errors import NotAdmittedError
from swarmkit.net.protocol.messages import SESSION
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import IncomingMessage
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.transport.part import PartTransport
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.net.transport.seam import Handler, Stream, Transport

_REFUSAL_TIMEOUT_S = 10.0


class ListedTransport(PartTransport):
    """Another transport that opens no stream to a peer that is not dealt with, and serves it none.

    The transport has authenticated the ids of the peers. A peer always deals with itself.
    """

    def __init__(self, transport: Transport, lists: PeerLists) -> None:
        super().__init__(transport)
        self._lists = lists

    async def listen(self, name: str, handler: Handler) -> None:
        async def admitted(stream: Stream) -> None:
            if self._admits(stream.peer_id):
                await handler(stream)
            else:
                await _refuse(stream)

        await super().listen(name, handler if self._lists.admit_all else admitted)

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        """See `Transport.open`.

        Raises:
            NotAdmittedError: the lists exclude the peer.
        """
        if not self._admits(peer_id):
            raise NotAdmittedError(f"the user's lists exclude peer {peer_id}: no stream is opened", peer_id)
        return await super().open(peer_id, name, addresses, timeout)

    def _admits(self, peer_id: str) -> bool:
        return peer_id == self.peer_id or self._lists.admit(peer_id)


class AdmittingTransport(PartTransport):
    """A peer's transport that serves no stream, at any endpoint, to peers that none of its parts admits.

    All parts of a peer listen through it, so that no endpoint is left out.
    """

    async def listen(self, name: str, handler: Handler) -> None:
        def admitted(stream: Stream) -> Awaitable[None]:
            return handler(stream) if self.admits(stream.peer_id) else _refuse(stream)

        await super().listen(name, admitted)


async def _refuse(stream: Stream) -> None:
    """Tell a peer, by the message that all protocols have for it, that it is not dealt with."""
    asking = ServerStream(stream, SESSION, max_payload_bytes=0, message_timeout=_REFUSAL_TIMEOUT_S)
    refusal = Refusal(
        "not_admitted",
        f"this peer does not admit peer {stream.peer_id}, by the lists of its owner; ask the owner, or use "
        "another one",
    )
    await asking.serve(_nothing, refusal)


async def _nothing(message: IncomingMessage) -> None:
    """Not called: the stream is refused before its first message."""
