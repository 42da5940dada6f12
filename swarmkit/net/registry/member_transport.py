"""A member's transport in a private swarm with an owner: it learns what is taken back, and ends streams.

The transport below lets no stream begin without a certificate. A certificate may expire or be taken back
while a stream goes on; so the streams that are open are looked at every few seconds, beside the work.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from contextlib import suppress

import anyio

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import ProtocolError, SwarmkitError
from swarmkit.net.registry.revocations import key_of
from swarmkit.net.transport.certificates import roles_in
from swarmkit.net.transport.members import Members
from swarmkit.net.transport.part import PartTransport
from swarmkit.net.transport.seam import Handler, Stream, Transport

logger = logging.getLogger(__name__)

PERIOD_S = 10.0
"""How long it takes at most until an open stream of a member that is no member any more ends, once the peer
knows it; and how often a peer looks for what the owner has taken back.
"""
_LIFETIME_S = 600.0


class MemberTransport(PartTransport):
    """A peer's transport, with a task that lives until `close`.

    Attributes: members: what this peer knows of who belongs to its swarm.
    """

    def __init__(self, transport: Transport, members: Members, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(transport)
        self.members = members
        self._clock = clock
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._key = key_of(members.swarm)
        self._task = asyncio.create_task(self._keep(), name="swarmkit-members")

    async def listen(self, name: str, handler: Handler) -> None:
        async def noted(stream: Stream) -> None:
            self._streams.add(stream)
            await handler(stream)

        await super().listen(name, noted)

    async def open(
        self, peer_id: str, name: str, addresses: Sequence[str] = (), timeout: float = 5.0
    ) -> Stream:
        stream = await super().open(peer_id, name, addresses, timeout)
        self._streams.add(stream)
        return stream

    async def look(self) -> None:
        """Learn what the owner has taken back, hand it on, and end the streams of those who are no members
        any more.

        Raises:
            TransportError: the table cannot be read.
        """
        try:
            found = await self._transport.fetch([self._key])
            for value in found.get(self._key, {}).values():
                with suppress(ProtocolError):
                    self.members.learn(value)
            await self.hand_on()
        finally:
            for stream in list(self._streams):
                if stream.peer_id != self.peer_id and not self.members.is_member(stream.peer_id):
                    logger.info("peer %s is no member any more; its stream ends", stream.peer_id)
                    stream.close()

    async def hand_on(self) -> int:
        """Keep the newest list in the table, if this peer may. Returns how many keys took it."""
        signed = self.members.signed_revocations
        if not signed or "serve" not in roles_in(self.members.chain):
            return 0
        return await self._transport.store([(self._key, signed)], self._clock.time() + _LIFETIME_S)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await super().close()

    async def _keep(self) -> None:
        while True:
            try:
                await self.look()
            except SwarmkitError as error:
                logger.debug("no look at what the owner has taken back: %s", error)
            await anyio.sleep(PERIOD_S)
