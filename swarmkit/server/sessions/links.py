"""How a server reaches the server with the next blocks, at a client's word, and dials nothing else for it.

A client names a server. Only one that has announced the next blocks under its signature is dialled, at the
addresses of that announcement that `may_dial` lets through. Every failure is answered with the same words and
after the same time, so that a client cannot learn from it which ports of which machines are open.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NoReturn

import anyio
import msgspec

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import PeerError, SwarmkitError
from swarmkit.net.protocol.messages import PUSH, Attach, Attached, Link
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.transport.dialling import may_dial
from swarmkit.net.transport.seam import Transport, endpoint_of, service_id
from swarmkit.server.sessions.link_times import LinkTimes
from swarmkit.server.sessions.push import Downstream

_DIALS_AT_A_TIME = 32
_DIALS_OF_A_CLIENT = 4
_LOOK_EVERY_S = 1.0

Find = Callable[[Link, int], Awaitable[Sequence[str]]]
"""`find(link, block)`: the addresses of the service that a link names; none unless it serves `block`."""


class NotLinkedError(PeerError):
    """The next server cannot be reached."""


class NextServers:
    """The announcements of the servers with the next blocks, looked up when they are needed."""

    def __init__(self, registry: Registry, fingerprint: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._registry = registry
        self._fingerprint = fingerprint
        self._clock = clock
        self._known: dict[int, dict[str, Announcement]] = {}
        self._looked_at: dict[int, float] = {}
        self._looking: defaultdict[int, anyio.Lock] = defaultdict(anyio.Lock)

    async def find(self, link: Link, block: int) -> Sequence[str]:
        """See `Find`.

        Raises:
            TransportError: the shared table cannot be asked.
        """
        name, asked_at = service_id(link.peer_id, link.service), self._clock.now()
        announcement = self._announcement(name, block)
        if announcement is None:
            async with self._looking[block]:
                if self._looked_at.get(block, -math.inf) < asked_at:  # one look answers all that wait for it
                    await self._look(block)
                announcement = self._announcement(name, block)
        if announcement is None:
            return ()
        return may_dial(announcement.addresses, self._registry.addresses)

    def _announcement(self, name: str, block: int) -> Announcement | None:
        found = self._known.get(block, {}).get(name)
        return found if found is not None and found.expires_at > self._clock.time() else None

    async def _look(self, block: int) -> None:
        """Look up the servers of a block, and do so once a second at most, whatever clients ask for."""
        since = self._clock.now() - self._looked_at.get(block, -math.inf)
        await anyio.sleep(max(0.0, _LOOK_EVERY_S - since))
        self._looked_at[block] = self._clock.now()
        found = await self._registry.look_up_block(self._fingerprint, block)
        self._known[block] = dict(found.announcements)


class Links:
    """Makes the ways to next servers."""

    def __init__(
        self,
        transport: Callable[[], Transport],
        find: Find,
        link_timeout: float,
        message_timeout: float,
        now: Callable[[], float] = SYSTEM_CLOCK.now,
        times: LinkTimes | None = None,
    ) -> None:
        """Prepare to link sessions.

        Args:
            transport: returns what streams are opened with.
            find: the addresses of next servers.
            link_timeout: seconds to reach the next server, and after which a failure is answered.
            message_timeout: seconds for the next server to take a step.
            now: seconds on this server's clock.
            times: where the round trips to next servers are noted.
        """
        self._times = times or LinkTimes(now)
        self._transport = transport
        self.find = find
        self._link_timeout = link_timeout
        self._message_timeout = message_timeout
        self._now = now
        self._dials = anyio.Semaphore(_DIALS_AT_A_TIME)
        self._of_clients: dict[str, anyio.Semaphore] = {}

    async def make(self, link: Link, block: int, client: str) -> Downstream:
        """Reach the next server's session.

        Args:
            block: the first of the next server's blocks.
            client: the peer that asks for it.

        Raises:
            NotLinkedError: the next server cannot be reached, for whatever reason; raised when the time for
                it is over.
        """
        stream = await self.reach(link, (block,), client, PUSH, Attach(link.inlet), Attached)
        return Downstream(stream, self._message_timeout)

    async def reach(
        self,
        link: Link,
        blocks: Iterable[int],
        client: str,
        protocol: Protocol,
        greeting: msgspec.Struct,
        welcome: type[msgspec.Struct],
    ) -> ClientStream:
        """Open a stream to a server that a client names, and say something on it.

        Args:
            blocks: which it must have announced.
            client: the peer that asks for it.
            welcome: the kind of answer to the greeting.

        Raises:
            NotLinkedError: as `make` does.
        """
        began = self._now()
        with suppress(SwarmkitError, TimeoutError), anyio.fail_after(self._link_timeout):
            found = [await self.find(link, block) for block in blocks]
            if all(found):
                async with self._turn(client), self._dials:
                    return await self._greet(link, found[0], protocol, greeting, welcome)
        await self._fail(began)

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncIterator[None]:
        """One of the few dials that a client may have under way, so that others can link as well."""
        turn = self._of_clients.setdefault(client, anyio.Semaphore(_DIALS_OF_A_CLIENT))
        try:
            async with turn:
                yield
        finally:
            unused = turn.value == _DIALS_OF_A_CLIENT and not turn.statistics().tasks_waiting
            if unused and self._of_clients.get(client) is turn:
                del self._of_clients[client]

    async def _greet(
        self,
        link: Link,
        addresses: Sequence[str],
        protocol: Protocol,
        greeting: msgspec.Struct,
        welcome: type[msgspec.Struct],
    ) -> ClientStream:
        name = endpoint_of(protocol.endpoint, link.service)
        transport = self._transport()
        stream = ClientStream(
            await transport.open(link.peer_id, name, addresses, self._link_timeout), protocol, clock=self._now
        )
        try:
            asked_at = self._now()
            await stream.ask(greeting, welcome)
            self._times.note(service_id(link.peer_id, link.service), self._now() - asked_at)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _fail(self, began: float) -> NoReturn:
        await anyio.sleep(max(0.0, began + self._link_timeout - self._now()))
        raise NotLinkedError("the next server cannot be reached")
