"""How many streams a service has open: all peers share the number of them fairly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.server_stream import LINGER_BYTES, ServerStream
from swarmkit.net.transport.rates import PeerRates
from swarmkit.net.transport.shares import HeldPlaces, Holder

_RETRY_S = 1.0
_DROPPED_PER_S = 2**20
"""Bytes that are read of what a host sends on streams that are not served any more, beyond the first ones."""


class StreamShares:
    """The open streams of a service, by the peers that opened them. Used by the event loop's thread only."""

    def __init__(self, capacity: int, clock: Callable[[], float] = SYSTEM_CLOCK.now) -> None:
        self.capacity = capacity
        self._streams: HeldPlaces[ServerStream] = HeldPlaces()
        self._dropping = PeerRates(_DROPPED_PER_S, LINGER_BYTES, clock)

    def __len__(self) -> int:
        return len(self._streams)

    @contextmanager
    def counted(self, stream: ServerStream, retry_after_s: float = _RETRY_S) -> Iterator[Refusal | None]:
        """Count a stream inside the `with` block, in the place of another one if there are too many.

        Args: retry_after_s: when a peer that is refused may try again.

        Yields: what the peer is told instead of being served, if there is no place for its stream.
        """
        refusal = None
        if len(self._streams) >= self.capacity and not self._make_room(stream.holder, retry_after_s):
            refusal = Refusal("busy", "too many streams are open; try another server", retry_after_s)
        self._streams.add(stream, stream.holder)
        stream.dropping = self._dropping
        try:
            yield refusal
        finally:
            self._streams.remove(stream)

    def _make_room(self, asking: Holder, retry_after_s: float) -> bool:
        victim = self._streams.gives_way(asking, self.capacity)
        # The stream that came last: those before it are likelier to be of use.
        last = None if victim is None else self._streams.last(victim)
        if last is None:
            return False
        self._streams.remove(last)
        last.dismiss(
            Refusal("busy", "this peer has more streams than its share, which others need", retry_after_s)
        )
        return True
