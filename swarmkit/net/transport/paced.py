"""A part of a peer whose streams share limits of their own, such as a server of a model."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence

from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.rates import Rates
from swarmkit.net.transport.seam import Handler, Stream, Transport


class PacedTransport(Transport):
    """Another transport, all of whose streams, served or opened here, share `rates`.

    The shared table is not paced.
    """

    def __init__(self, transport: Transport, rates: Rates) -> None:
        self._transport = transport
        self._rates = rates

    @property
    def identity(self) -> Identity:
        return self._transport.identity

    @property
    def peer_id(self) -> str:
        return self._transport.peer_id

    @property
    def addresses(self) -> Sequence[str]:
        return self._transport.addresses

    async def listen(self, name: str, handler: Handler) -> None:
        def paced(stream: Stream) -> Awaitable[None]:
            stream.rates = self._rates
            return handler(stream)

        await self._transport.listen(name, paced)

    async def unlisten(self, name: str) -> None:
        await self._transport.unlisten(name)

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        stream = await self._transport.open(peer_id, name, addresses, timeout)
        stream.rates = self._rates
        return stream

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        return await self._transport.store(records, expires_at, service)

    async def fetch(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, bytes]]:
        return await self._transport.fetch(keys)

    async def close(self) -> None:
        await self._transport.close()
