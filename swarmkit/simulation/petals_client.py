"""How Petals' clients choose servers, for comparison (its sequence manager; arXiv 2512.21884, section 4)."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Collection
from dataclasses import dataclass

from swarmkit.client.routing.route import Hop
from swarmkit.errors import NoRouteError, RemoteError
from swarmkit.net.registry.swarm_map import SwarmMap
from swarmkit.net.rpc.faults import Refusal
from swarmkit.simulation.distances import Distances
from swarmkit.simulation.server import SimulatedServer
from swarmkit.simulation.virtual_time import EPOCH, VirtualClock

_OVERHEAD_S = 0.018
_NO_CACHE_S = 10.0
_MOST_PAUSE_S = 60.0


@dataclass
class PetalsSearch:
    """What one session has seen: how often it was refused, and the servers that it waits for."""

    refusals: int = 0
    route: tuple[Hop, ...] = ()


class PetalsRouter:
    """The shortest path with half a round trip and 18 ms to each server, its own speed for each block, and
    10 s for a server without room; a server is used to the end of its blocks. A session keeps its route:
    where a server has no room it asks again after 1, 2, 4, … seconds.
    """

    def __init__(
        self,
        place: int,
        look_up: Callable[[], SwarmMap],
        server_of: Callable[[str], SimulatedServer | None],
        distances: Distances,
        clock: VirtualClock,
    ) -> None:
        self._place, self._look_up, self._server_of = place, look_up, server_of
        self._distances, self._clock = distances, clock

    def begin(self) -> PetalsSearch:
        return PetalsSearch()

    def next_step(self, state: PetalsSearch) -> PetalsSearch:
        return state

    async def find(
        self,
        state: PetalsSearch,
        start: int,
        stop: int,
        tokens: int,
        error: RemoteError | None,
        again_s: float,
    ) -> list[Hop]:
        if error is not None:
            await asyncio.sleep(min(2.0 ** max(0, state.refusals - 1), _MOST_PAUSE_S))
            kept = [hop for hop in state.route if start <= hop.start and hop.stop <= stop]
            if kept and kept[0].start == start and kept[-1].stop == stop:
                return kept
        found = self._shortest(start, stop, tokens)
        if not state.route:
            state.route = tuple(found)
        return found

    def elsewhere(self, start: int, stop: int, tokens: int, leaving: Collection[str]) -> list[Hop]:
        return []  # Petals' sessions stay with a server to its end

    def refused(self, hop: Hop, refusal: Refusal, state: PetalsSearch) -> RemoteError:
        state.refusals += 1
        return RemoteError(str(refusal), hop.server.peer_id, refusal.code, refusal.retry_after_s)

    def failed(self, hop: Hop, state: PetalsSearch, cost_s: float) -> None:
        state.route = ()

    def worked(self, hop: Hop, tokens: int, seconds: float, state: PetalsSearch) -> None:
        pass

    def left(self, hop: Hop) -> None:
        pass

    def _shortest(self, start: int, stop: int, tokens: int) -> list[Hop]:
        now = EPOCH + self._clock.now()
        servers = self._look_up().servers(now)
        places = {one.service_id: self._server_of(one.service_id) for one in servers}
        heap: list[tuple[float, int, int, tuple[Hop, ...]]] = [(0.0, 0, start, ())]
        done: set[tuple[int, str]] = set()
        number = 0
        while heap:
            seconds, _, block, route = heapq.heappop(heap)
            at = route[-1].server.service_id if route else ""
            if (block, at) in done:
                continue
            done.add((block, at))
            if block >= stop:
                return list(route)
            here = places[at] if at else None
            source = here.place if here is not None else self._place
            for one in servers:
                server = places[one.service_id]
                if server is None or not one.start <= block < one.stop:
                    continue
                high = min(one.stop, stop)
                cost = self._distances.seconds(source, server.place) + _OVERHEAD_S
                cost += (high - block) / (one.throughput * (one.stop - one.start))
                if not self._has_room(one.free_cache_tokens, tokens):
                    cost += _NO_CACHE_S
                number += 1
                heapq.heappush(heap, (seconds + cost, number, high, (*route, Hop(one, block, high))))
        raise NoRouteError("no server has some blocks", [(start, stop)])

    def _has_room(self, free_cache_tokens: float, tokens: int) -> bool:
        return free_cache_tokens >= tokens
