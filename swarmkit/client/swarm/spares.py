"""A spare route, kept warm: streams to the servers that would be used if those in use were lost.

A session that loses a server would otherwise dial another one first, and only then learn that it is gone too.
Each spare is asked every while what it is doing, which computes nothing: that shows that it is there, and how
far away it is. A session that needs the server takes the stream over.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

import anyio

from swarmkit.clock import Clock
from swarmkit.errors import PeerError, SwarmkitError
from swarmkit.net.protocol.messages import SESSION, GetInfo, ServerInfo
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.registry.records import Announcement
from swarmkit.net.rpc.client_stream import ClientStream

logger = logging.getLogger(__name__)

MOST_SPARES = 8
_ANSWER_S = 5.0
_KEPT_S = 45.0
"""A server ends a stream on which nothing comes for a minute; no older one is taken."""


class Spares:
    """The streams of one client, one for each spare server. Runs on the event loop's thread."""

    def __init__(
        self,
        *,
        connect: Callable[[Announcement, Protocol], Awaitable[ClientStream]],
        wanted: Callable[[], Sequence[Announcement]],
        note: Callable[[Announcement, float | PeerError], None],
        period_s: float,
        clock: Clock,
    ) -> None:
        """Make an empty set of spares.

        Args:
            connect: opens a stream to a server.
            wanted: the servers that are to be kept, best first.
            note: called with a server and the seconds after which it answered, or how it failed.
            period_s: between two questions.
        """
        self._connect = connect
        self._wanted = wanted
        self._note = note
        self.period_s = period_s
        self._clock = clock
        self._streams: dict[str, tuple[ClientStream, float]] = {}
        """Those that can be taken, and when the server answered."""

    @property
    def kept(self) -> frozenset[str]:
        """The servers to which there is a stream that can be taken, by service id."""
        return frozenset(self._streams)

    def take(self, server: Announcement) -> ClientStream | None:
        """The stream to a server, which is the caller's from now on; None if there is none."""
        stream, answered_at = self._streams.pop(server.service_id, (None, 0.0))
        if stream is not None and self._clock.now() - answered_at > _KEPT_S:
            stream.close()
            return None
        return stream

    async def run(self) -> None:
        """Keep spares until cancelled; then all streams that were not taken end."""
        try:
            while True:
                await anyio.sleep(self.period_s)
                await self.look()
        finally:
            self._close(self._streams)

    async def look(self) -> None:
        """Ask all that are wanted, and let go of the others."""
        wanted = {server.service_id: server for server in list(self._wanted())[:MOST_SPARES]}
        self._close([name for name in self._streams if name not in wanted])
        async with anyio.create_task_group() as tasks:
            for server in wanted.values():
                tasks.start_soon(self._ask, server)

    async def _ask(self, server: Announcement) -> None:
        stream = self.take(server)  # nobody may have it while it is asked
        try:
            if stream is None:
                stream = await self._connect(server, SESSION)
            asked_at = self._clock.now()
            with stream.within(_ANSWER_S):
                info = await stream.ask(GetInfo(), ServerInfo)
            self._note(server, self._clock.now() - asked_at)
        except PeerError as error:
            logger.info("%s does not answer as a spare: %s", server.label, error)
            self._note(server, error)
        except SwarmkitError as error:
            logger.debug("could not ask %s as a spare: %s", server.label, error)
        else:
            if not info.leaving and server.service_id not in self._streams:
                self._keep(server.service_id, stream)
                stream = None
        finally:
            if stream is not None:
                stream.close()

    def _keep(self, name: str, stream: ClientStream) -> None:
        self._streams[name] = stream, self._clock.now()

        def forget() -> None:
            if self._streams.get(name, (None,))[0] is stream:
                del self._streams[name]

        stream.stream.on_end(forget)

    def _close(self, names: Iterable[str]) -> None:
        for name in list(names):
            if name in self._streams:
                self._streams.pop(name)[0].close()
