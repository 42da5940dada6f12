"""Routes over the servers that are known, by what this client has seen of each."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from itertools import pairwise

from swarmkit.client.routing.bans import Bans
from swarmkit.client.routing.busy import BusyPeers
from swarmkit.client.routing.candidates import best_of_each_block
from swarmkit.client.routing.claims import Shown, counted_per_block
from swarmkit.client.routing.deadline import StepTimes
from swarmkit.client.routing.detours import detours
from swarmkit.client.routing.route import Cost, Hop, find_route, route_cost
from swarmkit.client.routing.step_failures import StepFailures
from swarmkit.clock import Clock
from swarmkit.events import EventStream, StepFinished
from swarmkit.net.registry.records import Announcement

_ASSUMED_ROUND_TRIP_S = 0.02
_UNLINKED_S = 600.0
_PROMPT_TOKENS = 128


class RoutePlanner:
    """Knows how long steps take at each server, and which servers reach each other; chooses among them.

    All sessions of one model share it, on the event loop's thread.
    """

    def __init__(
        self,
        *,
        servers: Callable[[str], Sequence[Announcement]],
        may_push: Callable[[], bool],
        bans: Bans,
        busy: BusyPeers,
        events: EventStream,
        times: dict[str, StepTimes],
        clock: Clock,
    ) -> None:
        """Know nothing of any server yet.

        Args:
            servers: those that may be used, by the hash of an adapter that they host.
            may_push: whether servers are to hand their outputs on to each other.
            events: of the client, whose steps tell which ways between servers are long.
            times: how long steps took at each server, by service id, to be noted there.
        """
        self._servers = servers
        self._may_push = may_push
        self._bans = bans
        self._busy = busy
        self._events = events
        self._clock = clock
        self.times = times
        self._unlinked: dict[tuple[str, str], float] = {}
        self.salt = secrets.token_hex(4)
        """Spreads clients over servers that are equally good."""

    # ------------------------------------------------------------------ routes

    def plan(
        self,
        start: int,
        stop: int,
        without: frozenset[str] = frozenset(),
        tokens: int = 0,
        hosted_adapter: str = "",
        failures: StepFailures | None = None,
    ) -> list[Hop]:
        """The best route for blocks [start, stop) in the view as it is; peers in `without` are not used.

        Args:
            tokens: rows x tokens that are to be held there.
            hosted_adapter: use only servers that host the adapter of this hash.
            failures: of the present step, whose servers are avoided even more than those banned.

        Raises:
            NoRouteError: no server has some of them.
        """
        servers = [server for server in self._servers(hosted_adapter) if server.service_id not in without]
        cost = self._cost(servers, tokens, failures or StepFailures())
        candidates = best_of_each_block(start, stop, servers, cost, self.salt)
        longer = self._detours(candidates) if self._may_push() else None
        return find_route(start, stop, candidates, cost, longer)

    def seconds(self, hops: Sequence[Hop], tokens: int = 0) -> float:
        """What a token over a route costs, as `plan` compares routes: in seconds, with all that speaks
        against a server.
        """
        cost = self._cost(self._servers(""), tokens, StepFailures())
        longer = self._detours([hop.server for hop in hops])
        ways = sum(longer.get((a.server.peer_id, b.server.peer_id), 0.0) for a, b in pairwise(hops))
        return ways + sum(cost(hop.server, hop.start, hop.stop) for hop in hops)

    def prompt_token_s(self, hops: Sequence[Hop]) -> float:
        """Seconds that each token of a prompt takes over a route, as seen, or as its servers say."""
        seconds = 0.0
        for hop in hops:
            times = self.times.get(hop.server.service_id)
            seen_s = times.usual_s(_PROMPT_TOKENS) if times else None
            claimed = hop.server.forward_rate or hop.server.throughput
            seconds += seen_s / _PROMPT_TOKENS if seen_s is not None else 1.0 / max(claimed, 1e-3)
        return seconds

    def _detours(self, servers: Sequence[Announcement]) -> dict[tuple[str, str], float]:
        return detours(self._events.kept(StepFinished), servers, self.way_s)

    def _cost(self, servers: Sequence[Announcement], tokens: int, failed: StepFailures) -> Cost:
        return route_cost(
            round_trip_s=self.way_s,
            penalty_s=lambda service_id: self._bans.penalty_s(service_id) + failed.penalty_s(service_id),
            wait_s=self._busy.wait_s,
            tokens=tokens,
            salt=self.salt,
            shown=self.shown,
            best_s=min(
                (
                    counted_per_block(_claimed_work_s(server, shown.blocks), shown)
                    for server in servers
                    if not self._bans.is_banned(server.service_id)
                    and (shown := self.shown(server.service_id)) is not None
                ),
                default=0.0,
            ),
        )

    def may_use(self, hop: Hop) -> bool:
        """Whether nothing is known that speaks against a server: it has not failed lately, nor is it busy."""
        service_id = hop.server.service_id
        return not self._bans.is_doubtful(service_id) and not self._busy.wait_s(service_id)

    # ------------------------------------------------------------------ what was seen of servers

    def times_of(self, server: Announcement) -> StepTimes:
        """How long this server's steps take, as seen by all sessions here."""
        if server.service_id not in self.times:
            self.times[server.service_id] = StepTimes(server.throughput)
        return self.times[server.service_id]

    def shown(self, service_id: str) -> Shown | None:
        """What a server has shown; None = it has never worked."""
        times = self.times.get(service_id)
        return None if times is None else times.shown

    def way_s(self, service_id: str) -> float:
        """Seconds to a server and back that computes nothing, measured or assumed."""
        times = self.times.get(service_id)
        return (times.way_s if times else 0.0) or _ASSUMED_ROUND_TRIP_S

    def round_trip_s(self, service_id: str) -> float:
        """Measured or assumed seconds to a server and back."""
        times = self.times.get(service_id)
        return (times.round_trip_s if times else None) or _ASSUMED_ROUND_TRIP_S

    def may_link(self, server: Announcement, following: Announcement) -> bool:
        """Whether one server may hand its outputs on to the other, as far as is known."""
        pair = (server.service_id, following.service_id)
        return self._may_push() and self._unlinked.get(pair, -math.inf) <= self._clock.now()

    def cannot_link(self, server: Announcement, following: Announcement) -> None:
        """Note that it cannot, or did it badly; it is asked again after a while."""
        now = self._clock.now()
        self._unlinked = {pair: until for pair, until in self._unlinked.items() if until > now}
        self._unlinked[server.service_id, following.service_id] = now + _UNLINKED_S


def claimed_per_block_s(server: Announcement) -> float:
    """Seconds per block that a server claims to take for a token."""
    return (_ASSUMED_ROUND_TRIP_S + 1 / max(server.throughput, 1e-3)) / (server.stop - server.start)


def _claimed_work_s(server: Announcement, blocks: int) -> float:
    return blocks / (server.stop - server.start) / max(server.throughput, 1e-3)
