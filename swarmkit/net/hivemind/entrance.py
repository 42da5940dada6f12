"""Connections that are not served yet. Who holds more of them than its share gives way to others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from swarmkit.errors import ProtocolError, SwarmkitError
from swarmkit.net.hivemind.framing import FrameStream
from swarmkit.net.transport.rates import TokenBucket
from swarmkit.net.transport.shares import HeldPlaces, Holder

_REMEMBERED = 4096


class Entrance:
    """Room for connections until they are served, shared out among the peers and hosts that they come from.

    Of a peer that gives way it is the connection that has waited longest which ends: one that means to be
    served says what it has to say at once. So a newcomer also takes the place of an older one of its own.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._waiting: HeldPlaces[FrameStream] = HeldPlaces()

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
        self._waiting.add(stream, holder)
        try:
            yield
        finally:
            self._waiting.remove(stream)

    def _make_room(self, asking: Holder) -> bool:
        oldest = self._waiting.first(self._waiting.gives_way(asking, self.capacity) or asking)
        if oldest is None:
            return False
        self._waiting.remove(oldest)
        oldest.abort(
            ProtocolError("it waited to be served for long, and others need its place", oldest.peer_id)
        )
        return True


class StreamGate:
    """Lets connections through one after the other, no faster than at a rate once a burst has passed.

    What is done for a connection that begins holds up everything else on the event loop, however little is
    left of it in the end. Hosts have their turns one after the other, and so have the peers of one host: who
    comes with one connection has not to wait for all those of somebody who comes with thousands.
    """

    def __init__(self, rate: TokenBucket) -> None:
        self._rate = rate
        self._is_taken = False
        self._queue: dict[Holder, dict[FrameStream, asyncio.Future[None]]] = {}
        self._turns = 0
        self._latest: dict[str | Holder, int] = {}
        """The number of the latest turn of each host, and of each peer."""

    async def turn(self, stream: FrameStream, holder: Holder) -> None:
        """Wait until a connection is let through.

        Raises:
            SwarmkitError: it has ended meanwhile.
        """
        if stream.has_ended:
            raise _ended(stream)
        if self._is_taken:
            await self._wait(stream, holder)
        self._is_taken = True
        try:
            if (wait_s := self._rate.take(1)) > 0:
                await anyio.sleep(wait_s)
        finally:
            self._turns += 1
            self._latest[holder] = self._latest[holder.host] = self._turns
            self._hand_on()

    async def _wait(self, stream: FrameStream, holder: Holder) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._queue.setdefault(holder, {})[stream] = turn
        try:
            await turn
        except BaseException as error:
            own = self._queue.get(holder, {})
            if own.pop(stream, None) is None and not isinstance(error, SwarmkitError):
                self._hand_on()  # it was its turn
            elif not own:
                self._queue.pop(holder, None)
            raise

    def _hand_on(self) -> None:
        """Let the next one through."""
        self._is_taken = False
        while self._queue:
            latest = self._latest
            holder = min(self._queue, key=lambda one: (latest.get(one.host, 0), latest.get(one, 0)))
            own = self._queue[holder]
            stream, turn = next(iter(own.items()))
            del own[stream]
            if not own:
                del self._queue[holder]
            if turn.done():
                continue
            if stream.has_ended:
                turn.set_exception(_ended(stream))
                continue
            self._is_taken = True
            turn.set_result(None)
            return
        if len(self._latest) > _REMEMBERED:  # with nobody waiting, nobody is before others
            self._latest.clear()


def _ended(stream: FrameStream) -> ProtocolError:
    return ProtocolError("the connection ended before it was let in", stream.peer_id)
