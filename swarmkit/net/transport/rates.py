"""Limits on how fast a peer sends and receives, which can be changed while streams are open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio

from swarmkit.clock import SYSTEM_CLOCK

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


class PeerRates:
    """The same rate for each of many peers.

    The peers that took something last are remembered: one that has been forgotten begins with a burst, as one
    under a new name would.
    """

    _MOST = 4096

    def __init__(
        self, per_second: float, burst: float, clock: Callable[[], float] = SYSTEM_CLOCK.now
    ) -> None:
        self._make = lambda: TokenBucket(per_second, burst, clock)
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        """How many peers are remembered."""
        return len(self._buckets)

    def take(self, peer_id: str, amount: float) -> float:
        """Take `amount` of a peer's rate, and return the seconds to wait before using it."""
        bucket = self._buckets.pop(peer_id, None) or self._make()
        self._buckets[peer_id] = bucket
        if len(self._buckets) > self._MOST:
            self._buckets.popitem(last=False)
        return bucket.take(amount)


@dataclass
class StreamTraffic:
    """Bytes of all frames that went through, without what the protocols below them add."""

    sent_bytes: int = 0
    received_bytes: int = 0


class Rates:
    """The rates of one peer in both directions, in bytes per second; None sets no limit.

    Every stream that has them as `rates` keeps to them, and counts its frames in `traffic`. Without a limit a
    frame costs it two comparisons and an addition.
    """

    def __init__(
        self,
        clock: Callable[[], float] = SYSTEM_CLOCK.now,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self.upload: TokenBucket | None = None
        self.download: TokenBucket | None = None
        self.traffic = StreamTraffic()

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
