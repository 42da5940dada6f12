"""A transport that fails on purpose: each send ends its stream with some probability."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from swarmkit.errors import PeerUnreachableError
from swarmkit.net.connect import TransportFactory
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.rates import Rates
from swarmkit.net.transport.seam import Buffer, Handler, RecordCheck, Stream, Transport


class Faults:
    """Decides which sends fail, from a seed, and counts them."""

    def __init__(self, probability: float, seed: int = 0) -> None:
        self.probability = probability
        self.sends = 0
        self.failed = 0
        self._random = random.Random(seed)

    def strikes(self) -> bool:
        """Whether this send fails."""
        self.sends += 1
        struck = self._random.random() < self.probability
        self.failed += struck
        return struck


class FaultyStream:
    """A stream whose sends may end it, as a connection ends that breaks while it is written to."""

    def __init__(self, stream: Stream, faults: Faults) -> None:
        self._stream = stream
        self._faults = faults

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
        """See `Stream.send`."""
        if self._faults.strikes():
            self._stream.close()
            raise PeerUnreachableError("the connection was lost on purpose", self.peer_id)
        await self._stream.send(*parts)

    async def receive(self) -> bytes:
        """See `Stream.receive`."""
        return await self._stream.receive()

    def on_end(self, call: Callable[[], object]) -> None:
        """See `Stream.on_end`."""
        self._stream.on_end(call)

    def close(self) -> None:
        """See `Stream.close`."""
        self._stream.close()


class FaultyTransport:
    """Another transport, but for the streams that are opened here."""

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    @property
    def identity(self) -> Identity:
        return self._inner.identity

    @property
    def peer_id(self) -> str:
        return self._inner.peer_id

    @property
    def addresses(self) -> Sequence[str]:
        return self._inner.addresses

    async def listen(self, name: str, handler: Handler) -> None:
        """See `Transport.listen`."""
        await self._inner.listen(name, handler)

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        """See `Transport.open`."""
        return FaultyStream(await self._inner.open(peer_id, name, addresses, timeout), self._faults)

    async def unlisten(self, name: str) -> None:
        """See `Transport.unlisten`."""
        await self._inner.unlisten(name)

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        """See `Transport.store`."""
        return await self._inner.store(records, expires_at, service)

    async def fetch(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, bytes]]:
        """See `Transport.fetch`."""
        return await self._inner.fetch(keys)

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._inner.close()


def with_faults(factory: TransportFactory, faults: Faults) -> TransportFactory:
    """The same transports, whose streams fail as `faults` decides."""

    async def create(identity: Identity, record_check: RecordCheck) -> Transport:
        return FaultyTransport(await factory(identity, record_check), faults)

    return create
