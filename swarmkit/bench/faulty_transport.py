"""A transport that fails on purpose: each send ends its stream with some probability."""

from __future__ import annotations

import random
from collections.abc import Sequence

from swarmkit.errors import PeerUnreachableError
from swarmkit.net.connect import TransportFactory
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.part import PartStream, PartTransport
from swarmkit.net.transport.seam import Buffer, RecordCheck, Stream, Transport


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


class FaultyStream(PartStream):
    """A stream whose sends may end it, as a connection ends that breaks while it is written to."""

    def __init__(self, stream: Stream, faults: Faults) -> None:
        super().__init__(stream)
        self._faults = faults

    async def send(self, *parts: Buffer) -> None:
        """See `Stream.send`."""
        if self._faults.strikes():
            self._stream.close()
            raise PeerUnreachableError("the connection was lost on purpose", self.peer_id)
        await super().send(*parts)


class FaultyTransport(PartTransport):
    """Another transport, but for the streams that are opened here."""

    def __init__(self, inner: Transport, faults: Faults) -> None:
        super().__init__(inner)
        self._faults = faults

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        """See `Transport.open`."""
        return FaultyStream(await super().open(peer_id, name, addresses, timeout), self._faults)


def with_faults(factory: TransportFactory, faults: Faults) -> TransportFactory:
    """The same transports, whose streams fail as `faults` decides."""

    async def create(identity: Identity, record_check: RecordCheck) -> Transport:
        return FaultyTransport(await factory(identity, record_check), faults)

    return create
