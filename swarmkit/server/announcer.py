"""What a server tells the swarm about one run of blocks, again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import anyio
import msgspec

from swarmkit._version import __version__
from swarmkit.clock import Clock
from swarmkit.errors import NoContactError, TransportError
from swarmkit.net.protocol.messages import MAX_ADDRESSES, printable
from swarmkit.net.protocol.protocol import OWN_VERSIONS
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.server.config import ServerConfig

logger = logging.getLogger(__name__)

_TRIES_IN_A_LIFETIME = 6
"""An announcement that failed is repeated so soon that what was announced before has not expired by then."""


class Announcer:
    """Announces one service of a peer; each announcement supersedes those before it."""

    def __init__(
        self,
        registry: Registry,
        config: ServerConfig,
        fingerprint: str,
        blocks: tuple[int, int],
        service: int,
        clock: Clock,
    ) -> None:
        """Args: service: the number of the service at this peer."""
        self._registry = registry
        self._clock = clock
        self._settings = config.settings.node
        self._latest = Announcement(
            peer_id=registry.peer_id,
            fingerprint=fingerprint,
            model=printable(config.checkpoint.name)[-256:],
            num_blocks=config.checkpoint.num_blocks,
            start=blocks[0],
            stop=blocks[1],
            state="joining",
            throughput=0.0,
            free_cache_tokens=0,
            dtype=config.precision.name,
            addresses=(),
            public_name=printable(config.public_name)[:64],
            software=f"swarmkit {__version__}",
            service=service,
            protocols=OWN_VERSIONS,
            sequence=0,
            expires_at=0.0,
        )

    async def announce(self, **news: Any) -> bool:
        """Announce what is new, and what was announced before of everything else.

        Args: news: fields of the `Announcement`.

        Returns: whether any peer took it.

        Raises:
            TransportError: the shared table cannot be reached.
        """
        now, latest = (
            self._clock.time(),
            self._latest,
        )  # a clock may be set back: later words win all the same
        self._latest = msgspec.structs.replace(
            latest,
            addresses=tuple(self._registry.addresses)[:MAX_ADDRESSES],
            sequence=max(int(now * 1e9), latest.sequence + 1),
            expires_at=max(now + self._settings.record_lifetime_s, latest.expires_at + 1e-3),
            **news,
        )
        if await self._registry.announce(self._latest) == 0:
            logger.warning("no peer accepted the announcement of this server; it will be tried again")
            # The next one need not outlive what no peer keeps, and what a clock that is wrong may have dated.
            self._latest = msgspec.structs.replace(self._latest, expires_at=0.0)
            return False
        return True

    async def announce_until(self, end: anyio.Event, news: Callable[[], dict[str, Any]]) -> None:
        """Announce every period until `end` is set, and sooner again where no peer took it.

        Raises:
            TransportError: for so long that the last announcement has expired, and no peer can know of this
                server any more.
        """
        settings = self._settings
        soon_s = min(settings.announce_period_s, settings.record_lifetime_s / _TRIES_IN_A_LIFETIME)
        succeeded_at = self._clock.now()
        pause_s = settings.announce_period_s
        while not end.is_set():
            with anyio.move_on_after(pause_s):
                await end.wait()
                return
            pause_s = soon_s
            try:
                if await self.announce(**news()):
                    pause_s = settings.announce_period_s
                succeeded_at = self._clock.now()
            except TransportError as error:
                too_long = self._clock.now() - succeeded_at > settings.record_lifetime_s
                # A transport without contact looks for it by itself, and the next announcement tries again.
                if too_long and not isinstance(error, NoContactError):
                    raise
                logger.warning("could not announce this server, will try again: %s", error)
