"""A step's search for servers of some blocks, which waits where there is none, or none that can.

Where servers are short of room, sessions that have begun come before new ones: what was computed for them
would be lost. A new session asks no server for which one of the same client waits that has begun, and is
given up sooner.
"""

from __future__ import annotations

import logging
import math

import anyio

from swarmkit.client.routing.route import Hop
from swarmkit.client.routing.step_failures import StepFailures
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import NoRouteError, PeerError, SwarmkitError
from swarmkit.events import Owner, WaitStarted

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class RouteSearch:
    """One step's search, which has `route_timeout_s` seconds, counted anew after any progress; a session that
    has begun waits for `room_timeout_s` seconds for servers that are there, but full.
    """

    def __init__(
        self,
        swarm: SwarmClient,
        owner: Owner,
        failures: StepFailures,
        hosted_adapter: str = "",
        *,
        has_begun: bool = False,
    ) -> None:
        """Make a search.

        Args:
            owner: the session that searches, for events.
            failures: the servers that failed in this step; they are avoided above all others.
            hosted_adapter: use only servers that host the adapter of this hash.
            has_begun: whether servers have done steps of the session before this one; see `lost_server`.
        """
        self._swarm = swarm
        self._owner = owner
        self._failures = failures
        self._hosted_adapter = hosted_adapter
        self._has_begun = has_begun
        self._since: float | None = None
        """When something went wrong, on the client's clock; None while all goes well."""
        self._unserved_since: float | None = None
        """Since when no server that works has some blocks; None while they are only busy."""
        self._pause_s = _FIRST_PAUSE_S
        self._told_waiting = False

    def lost_server(self) -> None:
        """A server that had let the session in was lost: it has begun, even where this is its first step."""
        self._has_begun = True

    def progress(self) -> None:
        """A stage did its part."""
        self._since = None
        self._pause_s = _FIRST_PAUSE_S

    async def find(
        self, start: int, stop: int, tokens: int, error: PeerError | None, again_s: float = math.inf
    ) -> list[Hop]:
        """A route for some blocks.

        Where no server has them, it waits for a new one. Servers that are avoided are used only if no other
        has the blocks, and after a pause; busy ones when they said they have room, if that is soonest.

        Args:
            tokens: rows x tokens that the servers' caches will have to hold.
            error: why others are needed.
            again_s: seconds that it takes to compute once more what the session holds at servers of other
                blocks, if it can begin anew; inf = it cannot.

        Returns: the servers in order; none if all that could be used are busy for longer than `again_s`. The
            session then gives back what it holds, for others to use meanwhile, and searches for all blocks.

        Raises:
            NoRouteError: no server was found in time.
        """
        swarm = self._swarm
        while True:
            route = self._plan(start, stop, tokens)
            banned = any(self._is_avoided(hop.server.service_id) for hop in route)
            names = {hop.server.service_id for hop in route}
            busy_s = max(map(swarm.busy.wait_s, names), default=0.0)
            if not self._has_begun and swarm.busy.is_awaited(names):
                busy_s = max(busy_s, _LONGEST_PAUSE_S)
            if route and not banned and not busy_s:
                return route
            only_busy = bool(route) and not banned
            left_s = self._left_s(only_busy)
            if left_s <= 0:
                await swarm.known.look_for_other_models()
                raise self._gave_up(start, stop, route, error, busy=only_busy) from error
            if only_busy and busy_s > again_s:
                return []
            self._tell(
                ((start, stop),) if only_busy else swarm.known.unserved(start, stop), left_s, only_busy
            )
            if only_busy:
                assert self._since is not None
                pause_s = min(busy_s, _LONGEST_PAUSE_S, left_s)
                await swarm.busy.wait(names, self._since, pause_s, has_begun=self._has_begun)
                continue
            give_up_at = swarm.clock.now() + left_s
            await anyio.sleep(min(self._pause_s, left_s))
            self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
            await self._look_up(give_up_at)
            if route:
                return self._plan(start, stop, tokens) or route

    def _left_s(self, only_busy: bool) -> float:
        """Seconds for which it goes on waiting.

        Args: only_busy: whether servers of all blocks are there, and have no room.
        """
        routing, now = self._swarm.settings.routing, self._swarm.clock.now()
        if self._since is None:
            self._since = self._unserved_since = now
        if not self._has_begun:
            return self._since + routing.route_timeout_s - now
        most_s = max(routing.route_timeout_s, routing.room_timeout_s)
        if only_busy:
            self._unserved_since = None
            return self._since + most_s - now
        if self._unserved_since is None:
            self._unserved_since = now
        return min(self._unserved_since + routing.route_timeout_s, self._since + most_s) - now

    def _tell(self, missing: tuple[tuple[int, int], ...], left_s: float, busy: bool) -> None:
        if not self._told_waiting:
            self._told_waiting = True
            self._swarm.known.look_soon()  # another server may have joined
            self._swarm.events.emit(
                WaitStarted(missing, left_s, busy, time=self._swarm.clock.time(), owner=self._owner)
            )

    async def _look_up(self, give_up_at: float) -> None:
        """Look up the servers anew, if there is time for it."""
        try:
            with anyio.move_on_after(give_up_at - self._swarm.clock.now()):
                await self._swarm.known.refresh()
        except SwarmkitError as error:
            logger.warning("could not look up the swarm, will try again: %s", error)

    def _plan(self, start: int, stop: int, tokens: int) -> list[Hop]:
        """The best route as things stand; empty if there is none."""
        try:
            return self._swarm.routes.plan(
                start, stop, tokens=tokens, hosted_adapter=self._hosted_adapter, failures=self._failures
            )
        except NoRouteError:
            return []

    def _is_avoided(self, service_id: str) -> bool:
        return self._swarm.bans.is_banned(service_id) or self._failures.has_failed(service_id)

    def _gave_up(
        self, start: int, stop: int, route: list[Hop], error: PeerError | None, *, busy: bool
    ) -> Exception:
        if not route or not self._swarm.known.has_contact:
            return self._swarm.known.no_route(start, stop)
        what = "had no room" if busy else "kept failing"
        seconds = self._swarm.clock.now() - (self._since or 0.0)
        # What another session was told keeps this one waiting as well, which then has no error of its own.
        cause = f" ({error})" if error is not None else ""
        return NoRouteError(
            f"the only servers of blocks {start}:{stop} {what} for {seconds:.0f} s{cause}; "
            "start another server for them, or try again later",
            [(start, stop)],
        )
