"""A part of a peer that uses the peer's transport under conditions of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.net.transport.rates import Rates
from swarmkit.net.transport.seam import Buffer, Handler, Stream, Transport


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

    def deal_with(self, lists: PeerLists) -> AbstractContextManager[None]:
        return self._transport.deal_with(lists)

    def admits(self, peer_id: str) -> bool:
        return self._transport.admits(peer_id)

    def kill(self) -> None:
        self._transport.kill()

    async def close(self) -> None:
        await self._transport.close()


class PartStream(Stream):
    """Another stream. Subclasses say what is different."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def peer_id(self) -> str:
        return self._stream.peer_id

    @property
    def host(self) -> str:
        return self._stream.host

    @host.setter
    def host(self, host: str) -> None:
        self._stream.host = host

    @property
    def rates(self) -> Rates | None:
        return self._stream.rates

    @rates.setter
    def rates(self, rates: Rates | None) -> None:
        self._stream.rates = rates

    async def send(self, *parts: Buffer) -> None:
        await self._stream.send(*parts)

    async def receive(self) -> bytes:
        return await self._stream.receive()

    def on_end(self, call: Callable[[], object]) -> None:
        self._stream.on_end(call)

    def close(self) -> None:
        self._stream.close()
