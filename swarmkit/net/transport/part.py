"""A part of a peer that uses the peer's transport under conditions of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.seam import Handler, Stream, Transport


class PartTransport(Transport):
    """Another transport, for one part of its peer. Subclasses say what is different."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

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
        await self._transport.listen(name, handler)

    async def unlisten(self, name: str) -> None:
        await self._transport.unlisten(name)

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        return await self._transport.open(peer_id, name, addresses, timeout)

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        return await self._transport.store(records, expires_at, service)

    async def fetch(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, bytes]]:
        return await self._transport.fetch(keys)

    async def close(self) -> None:
        await self._transport.close()
