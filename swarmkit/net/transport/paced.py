"""A part of a peer whose streams share limits of their own, such as a server of a model."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from swarmkit.net.transport.part import PartTransport
from swarmkit.net.transport.rates import Rates
from swarmkit.net.transport.seam import Handler, Stream, Transport


class PacedTransport(PartTransport):
    """Another transport, all of whose streams, served or opened here, share `rates`.

    The shared table is not paced.
    """

    def __init__(self, transport: Transport, rates: Rates) -> None:
        super().__init__(transport)
        self._rates = rates

    async def listen(self, name: str, handler: Handler) -> None:
        def paced(stream: Stream) -> Awaitable[None]:
            stream.rates = self._rates
            return handler(stream)

        await super().listen(name, paced)

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        stream = await super().open(peer_id, name, addresses, timeout)
        stream.rates = self._rates
        return stream
