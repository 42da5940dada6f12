"""Limits on how fast a peer sends and receives, which can be changed while streams are open.

`PacedTransport` wraps a transport: all streams that it opens or serves share one rate in each direction. A
stream without a limit costs one comparison for each frame.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import anyio

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.seam import Buffer, Handler, Stream, Transport

_LEAST_BURST_BYTES = 16 * 1024
_BURST_S = 0.1


class TokenBucket:
    """A rate: `take(amount)` returns how long to wait until that amount may pass.

    A burst passes at once. An amount larger than what is there goes into debt, for which later ones wait.
    """

    def __init__(
        self, per_second: float, burst: float, clock: Callable[[], float] = SYSTEM_CLOCK.now
    ) -> None:
        self._rate = per_second
        self._burst = burst
        self._clock = clock
        self._level = burst
        self._at = clock()

    def take(self, amount: float) -> float:
        """Take `amount`, and return the seconds to wait before using it."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        self._level -= amount
        return max(0.0, -self._level / self._rate)


class Rates:
    """The rates of one peer in both directions, in bytes per second; None sets no limit."""

    def __init__(
        self,
        clock: Callable[[], float] = SYSTEM_CLOCK.now,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self.upload: TokenBucket | None = None
        self.download: TokenBucket | None = None

    def replace(self, upload_bytes_per_s: float | None, download_bytes_per_s: float | None) -> None:
        """Pace every frame that is sent or received from now on at these rates."""
        self.upload = self._bucket(upload_bytes_per_s)
        self.download = self._bucket(download_bytes_per_s)

    async def wait(self, bucket: TokenBucket, nbytes: int) -> None:
        """Wait until `nbytes` may pass."""
        if (wait_s := bucket.take(nbytes)) > 0:
            await self._sleep(wait_s)

    def _bucket(self, rate: float | None) -> TokenBucket | None:
        if rate is None:
            return None
        return TokenBucket(rate, max(_LEAST_BURST_BYTES, rate * _BURST_S), self._clock)


class PacedStream(Stream):
    """A stream whose frames wait until the rates let them pass."""

    def __init__(self, stream: Stream, rates: Rates) -> None:
        self._stream = stream
        self._rates = rates

    @property
    def peer_id(self) -> str:
        return self._stream.peer_id

    async def send(self, *parts: Buffer) -> None:
        if (bucket := self._rates.upload) is not None:
            await self._rates.wait(bucket, sum(memoryview(part).nbytes for part in parts))
        await self._stream.send(*parts)

    async def receive(self) -> bytes:
        frame = await self._stream.receive()
        # The frame has arrived. To hold it back keeps the next ones from being read, and so slows the sender.
        if (bucket := self._rates.download) is not None:
            await self._rates.wait(bucket, len(frame))
        return frame

    def on_end(self, call: Callable[[], object]) -> None:
        self._stream.on_end(call)

    def close(self) -> None:
        self._stream.close()


class PacedTransport(Transport):
    """A transport whose streams, served or opened, share `rates`. The shared table is not paced."""

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
        async def paced(stream: Stream) -> None:
            await handler(PacedStream(stream, self._rates))

        await self._transport.listen(name, paced)

    async def unlisten(self, name: str) -> None:
        await self._transport.unlisten(name)

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        return PacedStream(await self._transport.open(peer_id, name, addresses, timeout), self._rates)

    async def store(self, records: Iterable[tuple[str, bytes]], expires_at: float, service: int = 0) -> int:
        return await self._transport.store(records, expires_at, service)

    async def fetch(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, bytes]]:
        return await self._transport.fetch(keys)

    async def close(self) -> None:
        await self._transport.close()
