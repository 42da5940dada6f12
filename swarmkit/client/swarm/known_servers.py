"""The servers of a model, as far as a client knows them: looked up every period, and when a session asks."""

from __future__ import annotations

import logging
import random
from collections.abc import Container, Iterable
from dataclasses import dataclass

import anyio

from swarmkit.client.routing.bans import Bans
from swarmkit.client.routing.candidates import within_bounds
from swarmkit.client.routing.route import left_out, lost_contact, no_route, shut_out
from swarmkit.clock import Clock
from swarmkit.errors import NoContactError, PeerError, SwarmkitError
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.registry.swarm_map import SwarmMap
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.placement.ranges import uncovered
from swarmkit.settings import RoutingSettings

logger = logging.getLogger(__name__)

_OTHERS_TIMEOUT_S = 5.0
_LOOK_PAUSE_S = 0.5


@dataclass(frozen=True)
class ModelRef:
    """Which model the servers must serve."""

    name: str
    fingerprint: str
    num_blocks: int
    hidden_size: int


class KnownServers:
    """The view of the swarm that all sessions of one model share. Runs on the event loop's thread."""

    def __init__(
        self,
        model: ModelRef,
        settings: RoutingSettings,
        lists: PeerLists,
        bans: Bans,
        used: Container[str],
        clock: Clock,
        chance: random.Random,
    ) -> None:
        """Know none yet.

        Args:
            lists: the peers that the user allows.
            bans: is told which servers have announced themselves anew.
            used: the servers that were used or tried, by service id.
            chance: draws which servers are known, where a flood of them announces itself.
        """
        self._model = model
        self._settings = settings
        self._lists = lists
        self._bans = bans
        self._used = used
        self._clock = clock
        self._chance = chance
        self._registry: Registry | None = None
        self._own_id = ""
        self.view = SwarmMap()
        self.looks = 0
        """How often it has looked who serves."""
        self._looked_at = clock.time()
        self._looking = anyio.Lock()
        self._look_now = anyio.Event()
        self._no_contact: NoContactError | None = None
        self._other_models: list[str] = []

    # ------------------------------------------------------------------ looking

    async def begin(self, registry: Registry, own_id: str) -> None:
        """Look up the servers for the first time, and from now on in this registry.

        Args: own_id: of the client's own peer, by which servers admit it.
        """
        self._registry, self._own_id = registry, own_id
        await self.refresh()

    async def run(self) -> None:
        """Look them up every period, until cancelled."""
        while True:
            with anyio.move_on_after(self._settings.refresh_period_s):
                await self._look_now.wait()
            try:
                await self.refresh()
            except SwarmkitError as error:
                logger.warning("could not look up the swarm, will try again: %s", error)
            self._look_now = anyio.Event()
            await anyio.sleep(min(_LOOK_PAUSE_S, self._settings.refresh_period_s))

    async def refresh(self) -> SwarmMap:
        """Look up the servers of the model."""
        assert self._registry is not None
        looks = self.looks
        async with self._looking:
            if self.looks == looks:  # else another call began to look meanwhile, and has the answer
                self.looks += 1
                asked_at = self._clock.now()
                try:
                    model = self._model
                    found = await self._registry.look_up(model.fingerprint, model.num_blocks, self._used)
                except NoContactError as error:
                    self._no_contact = error
                    raise
                self._no_contact = None
                self._looked_at = self._clock.time()
                view = self.view.without_expired(self._looked_at).apply(*found.announcements.values())
                self.view = within_bounds(view, self._used, self._chance)
                self._bans.heard(self.view.announcements, asked_at)
        return self.view

    async def look(self) -> list[Announcement]:
        """All servers of the model, as they are now."""
        return list((await self.refresh()).servers(self._clock.time()))

    def look_soon(self) -> None:
        """Have the swarm looked up before the usual time; does not wait for it."""
        self._look_now.set()

    async def look_for_other_models(self) -> None:
        """Where no server of the model is known, find out what the swarm serves instead, for the error."""
        if (
            list(self.view.servers(self._clock.time()))
            or self._no_contact is not None
            or self._registry is None
        ):
            return
        try:
            with anyio.move_on_after(_OTHERS_TIMEOUT_S):
                found = await self._registry.look_up_all()
                self._other_models = sorted({each.model for each in found.servers(self._clock.time())})
        except SwarmkitError as error:
            logger.debug("could not look up the swarm's models: %s", error)

    @property
    def has_contact(self) -> bool:
        """Whether other peers of the swarm answered the latest look-up."""
        return self._no_contact is None

    # ------------------------------------------------------------------ who serves

    def allowed(self) -> list[Announcement]:
        """The servers in the view that the user allows; those at its loss where there is no contact."""
        now = self._clock.time() if self._no_contact is None else self._looked_at
        return [server for server in self.view.servers(now) if self._lists.admit(server.peer_id)]

    def servers(self, hosted_adapter: str = "") -> list[Announcement]:
        """Those in the view as it is that may be used.

        Args: hosted_adapter: for sessions and passes with the hosted adapter of this hash.
        """
        wanted = self._settings.precisions
        servers = [s for s in self.allowed() if not wanted or s.dtype in wanted]
        if hosted_adapter:
            servers = [s for s in servers if any(one.name == hosted_adapter for one in s.adapters)]
        return servers

    # ------------------------------------------------------------------ what is missing

    def unserved(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """The blocks that no server has, apart from peers that are avoided because they failed."""
        servers = [s for s in self.allowed() if not self._bans.is_banned(s.service_id)]
        return tuple(_uncovered(start, stop, servers))

    def no_route(self, start: int, stop: int) -> Exception:
        """The error that says which of these blocks no server has now, or that this client cannot know it."""
        if self._no_contact is not None:
            return lost_contact(start, stop, self._no_contact.since)
        missing = _uncovered(start, stop, self.allowed())
        there = _uncovered(start, stop, self.view.servers(self._clock.time()))
        if missing and missing != there:
            return left_out(missing)
        return no_route(start, stop, self.allowed(), self._model.name, self._other_models)

    def check_admission(self, start: int, stop: int, error: PeerError, hosted_adapter: str = "") -> None:
        """Give up where waiting is of no use: every server of some block has refused this client altogether.

        Args:
            error: of the server that failed last.
            hosted_adapter: use only servers that host the adapter of this hash.

        Raises:
            NoRouteError: they all have, as far as they are known.
        """
        if not error.is_exclusion:
            return
        others = [one for one in self.servers(hosted_adapter) if not self._bans.excludes(one.service_id)]
        if missing := _uncovered(start, stop, others):
            raise shut_out(missing, self._own_id, error) from error


def _uncovered(start: int, stop: int, servers: Iterable[Announcement]) -> list[tuple[int, int]]:
    return uncovered(start, stop, [(server.start, server.stop) for server in servers])
