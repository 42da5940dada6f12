"""Announce and look up servers in the table that all peers share."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import secrets
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager

from swarmkit.clock import system_date
from swarmkit.errors import ProtocolError
from swarmkit.net.registry import records
from swarmkit.net.registry.lot import draw
from swarmkit.net.registry.records import MODELS_KEY, Announcement, block_key, keys_of
from swarmkit.net.registry.swarm_map import SwarmMap
from swarmkit.net.transport.seam import Transport

logger = logging.getLogger(__name__)

_MOST_REMEMBERED = 8192
_MOST_NEW_RECORDS = 4096
"""New records that one look reads. To verify a signature takes a tenth of a millisecond."""
_READ_IN_A_TURN = 64
"""Records that are read before others have their turn on the event loop."""


class Registry:
    """This peer's access to the shared table. It owns no task: its users call it in loops of their own."""

    def __init__(
        self,
        transport: Transport,
        clock: Callable[[], float] = system_date,
        *,
        most_remembered: int = _MOST_REMEMBERED,
        most_new: int = _MOST_NEW_RECORDS,
    ) -> None:
        """Args:
        clock: Unix time, seconds.
        most_remembered: records that were verified once and are not verified again.
        most_new: new records that one look reads.
        """
        self._transport = transport
        self._clock = clock
        self._most_remembered = most_remembered
        self._most_new = most_new
        self._known: OrderedDict[bytes, Announcement] = OrderedDict()
        self._rejected = 0
        self._chance = random.Random(secrets.token_hex(8))
        self._numbers: set[int] = set()

    @property
    def peer_id(self) -> str:
        """The peer that announces by this registry."""
        return self._transport.peer_id

    @property
    def addresses(self) -> Sequence[str]:
        """Where this peer can be dialled."""
        return self._transport.addresses

    @contextmanager
    def numbered(self) -> Iterator[int]:
        """A number for a service of this peer, the smallest that no other one has inside its `with`.

        A peer that restarts begins with 0 again, so that its announcements supersede those from before.
        """
        number = next(number for number in itertools.count() if number not in self._numbers)
        self._numbers.add(number)
        try:
            yield number
        finally:
            self._numbers.remove(number)

    @property
    def remembered(self) -> int:
        """How many records are remembered, whose signatures need not be verified again."""
        return len(self._known)

    @property
    def rejected(self) -> int:
        """How many records were ignored because something about them was wrong."""
        return self._rejected

    async def announce(self, announcement: Announcement) -> int:
        """Store an announcement under each of its keys. Returns how many keys took it."""
        value = records.sign(announcement, self._transport.identity)
        return await self._transport.store(
            [(key, value) for key in keys_of(announcement)], announcement.expires_at, announcement.service
        )

    async def look_up(
        self, fingerprint: str, num_blocks: int, first: Container[str] = frozenset()
    ) -> SwarmMap:
        """The servers that announce a block of the model.

        Args: first: ids of services whose announcements are read in any case, however many others there are.
        """
        keys = [block_key(fingerprint, block) for block in range(num_blocks)]
        found = [r for r in await self._read(keys, first) if r.num_blocks == num_blocks]
        return SwarmMap().apply(*found)

    async def look_up_block(self, fingerprint: str, block: int) -> SwarmMap:
        """The servers that announce one block of the model."""
        return SwarmMap().apply(*await self._read([block_key(fingerprint, block)]))

    async def look_up_all(self) -> SwarmMap:
        """All servers that announce anything."""
        return SwarmMap().apply(*await self._read([MODELS_KEY]))

    async def wait_for(
        self,
        fingerprint: str,
        num_blocks: int,
        enough: Callable[[SwarmMap], bool],
        *,
        timeout: float,
        poll: float = 0.25,
    ) -> SwarmMap:
        """Look up until `enough(map)` or `timeout` seconds have passed; the last map either way."""
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            found = await self.look_up(fingerprint, num_blocks)
            if enough(found) or asyncio.get_running_loop().time() >= deadline:
                return found
            await asyncio.sleep(poll)

    async def _read(self, keys: Iterable[str], first: Container[str] = frozenset()) -> list[Announcement]:
        """The announcements under some keys, each once.

        A flood of records neither holds up the event loop nor the caller: so many new ones are read at a
        time, those of the services in `first` and others drawn by lot, and what is left at later times.
        """
        now = self._clock()
        places: dict[tuple[str, bytes], list[str]] = {}
        for key, entries in (await self._transport.fetch(keys)).items():
            for subkey, value in entries.items():
                places.setdefault((subkey, value), []).append(key)
        new = [record for record in places if record[1] not in self._known and record[0] not in first]
        if len(new) > self._most_new:
            logger.warning("only %d of %d new announcements are read at a time", self._most_new, len(new))
            drawn = set(draw(new, places.__getitem__, self._most_new, self._chance))
            for record in new:
                if record not in drawn:
                    del places[record]
        good: dict[int, Announcement] = {}
        for number, ((subkey, value), under) in enumerate(places.items(), start=1):
            if not number % _READ_IN_A_TURN:
                await asyncio.sleep(0)
            for key in under:
                try:
                    announcement = self._remember(key, subkey, value, now)
                    good[id(announcement)] = announcement
                except ProtocolError as error:  # noqa: PERF203
                    self._rejected += 1
                    logger.debug("ignored a record at %s from %s: %s", key, subkey, error)
        return list(good.values())

    def _remember(self, key: str, subkey: str, value: bytes, now: float) -> Announcement:
        """Read a record; a signature that was checked once is not checked again under the next key."""
        try:
            return records.read(key, subkey, value, now, self._known)
        finally:
            # Also for a record that is well signed and yet refused, of which a peer can make any number.
            if value in self._known:
                self._known.move_to_end(value)
            while len(self._known) > self._most_remembered:
                self._known.popitem(last=False)
