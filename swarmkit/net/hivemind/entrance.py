"""Connections that are not served yet. Who holds more of them than its share gives way to others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from swarmkit.errors import ProtocolError
from swarmkit.net.hivemind.framing import FrameStream
from swarmkit.net.transport.shares import Holder, gives_way


class Entrance:
    """Room for connections until they are served, shared out among the peers and hosts that they come from.

    Of a peer that gives way it is the connection that has waited longest which ends: one that means to be
    served says what it has to say at once. So a newcomer also takes the place of an older one of its own.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._waiting: dict[FrameStream, Holder] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def holds(self, stream: FrameStream, holder: Holder) -> Iterator[None]:
        """Count a connection inside the `with` block, in the place of another one if there are too many.

        Args: holder: as far as it is known whom the connection comes from.

        Raises:
            ProtocolError: all places are taken by others, none of which has more than its share.
        """
        if len(self._waiting) >= self.capacity and not self._make_room(holder):
            raise ProtocolError("too many connections wait to be served", stream.peer_id)
        self._waiting[stream] = holder
        try:
            yield
        finally:
            self._waiting.pop(stream, None)

    def _make_room(self, asking: Holder) -> bool:
        held: dict[Holder, float] = {}
        for holder in self._waiting.values():
            held[holder] = held.get(holder, 0.0) + 1
        victim = gives_way(held, asking, 1, self.capacity) or asking
        oldest = next((stream for stream, holder in self._waiting.items() if holder == victim), None)
        if oldest is None:
            return False
        del self._waiting[oldest]
        oldest.abort(
            ProtocolError("it waited to be served for long, and others need its place", oldest.peer_id)
        )
        return True
