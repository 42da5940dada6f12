"""A virtual client: the package's own `SwarmClient` decides, and answers take their time."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Collection, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol, cast

import anyio

from swarmkit.client.routing.route import Hop
from swarmkit.client.routing.step_failures import StepFailures
from swarmkit.client.swarm.client import ModelRef, SwarmClient
from swarmkit.client.swarm.route_search import RouteSearch
from swarmkit.errors import NoRouteError, PeerUnreachableError, RemoteError
from swarmkit.events import Owner
from swarmkit.net.registry.registry import Registry
from swarmkit.net.registry.swarm_map import SwarmMap
from swarmkit.net.rpc.faults import Refusal
from swarmkit.settings import ClientSettings
from swarmkit.simulation.demand import SimulatedRequest
from swarmkit.simulation.distances import Distances
from swarmkit.simulation.hardware import SimulatedModel
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.server import FINGERPRINT, SimulatedPlace, SimulatedServer
from swarmkit.simulation.virtual_time import VirtualClock

CONNECT_S = 1.0
"""A client waits so long for a server that does not exist any more."""
_LOOK_AROUND_S = 1.0
"""A session at a server that leaves looks for others so often, where many tokens are one step."""

_Stage = tuple[Hop, SimulatedServer, SimulatedPlace]


@dataclass
class SimulatedAnswer:
    """What became of a request. Times are seconds since it came."""

    request: SimulatedRequest
    waited_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    replaced: int = 0
    """Servers that were lost or left meanwhile, and replaced."""
    begun: bool = False
    """Whether servers had let it in."""
    lost: bool = False
    """Whether it got no answer: it was lost, or, where it had not begun, turned away."""
    uncovered: bool = False
    """Whether some block had no server at the time when it was lost."""
    route: list[str] = field(default_factory=list)


class Router(Protocol):
    """Chooses servers for one client."""

    def begin(self) -> Any:
        """The state of one session's search."""

    def next_step(self, state: Any) -> Any:
        """The state of the search of a step of a session that has begun, or has lost a server."""

    async def find(
        self, state: Any, start: int, stop: int, tokens: int, error: RemoteError | None, again_s: float
    ) -> list[Hop]:
        """Servers for some blocks; waits where it must. None if it had better begin anew, which takes
        `again_s`.

        Raises:
            NoRouteError: none were found in time.
        """

    def elsewhere(self, start: int, stop: int, tokens: int, leaving: Collection[str]) -> list[Hop]:
        """Servers for some blocks that can be used at once, but for those that leave; none if there are none.

        Args: leaving: the servers that leave, by service id.
        """

    def refused(self, hop: Hop, refusal: Refusal, state: Any) -> RemoteError:
        """A server has no room."""

    def failed(self, hop: Hop, state: Any, cost_s: float) -> None:
        """A server is gone."""

    def worked(self, hop: Hop, tokens: int, seconds: float, state: Any) -> None:
        """A step went through a server."""

    def left(self, hop: Hop) -> None:
        """A session gave its place at a server back."""


class SwarmRouter:
    """The package's own routing: `SwarmClient` and `RouteSearch`."""

    def __init__(
        self,
        model: SimulatedModel,
        look_up: Callable[[], SwarmMap],
        clock: VirtualClock,
        name: str,
        settings: ClientSettings | None = None,
    ) -> None:
        ref = ModelRef(model.name, FINGERPRINT, model.size.num_blocks, model.hidden_bytes // 2)
        self.client = SwarmClient(ref, settings, clock=clock)
        self.client.routes.salt = name  # else it is drawn anew for each run
        self.client.chance = random.Random(name).random
        self._look_up = look_up
        self._owner = Owner("session", name)

    async def run(self) -> None:
        """Look up the swarm every period."""

        async def look_up(fingerprint: str, num_blocks: int, first: Container[str]) -> SwarmMap:
            return self._look_up()

        async def look_up_all() -> SwarmMap:
            return self._look_up()

        await self.client.run(
            transport=cast(Any, SimpleNamespace(peer_id=self._owner.peer_id, deal_with=nullcontext)),
            registry=cast(Registry, SimpleNamespace(look_up=look_up, look_up_all=look_up_all)),
        )

    def begin(self) -> tuple[RouteSearch, StepFailures]:
        failures = StepFailures()
        return RouteSearch(self.client, self._owner, failures), failures

    def next_step(self, state: tuple[RouteSearch, StepFailures]) -> tuple[RouteSearch, StepFailures]:
        failures = StepFailures()
        return RouteSearch(self.client, self._owner, failures, has_begun=True), failures

    async def find(
        self,
        state: tuple[RouteSearch, StepFailures],
        start: int,
        stop: int,
        tokens: int,
        error: RemoteError | None,
        again_s: float,
    ) -> list[Hop]:
        return await state[0].find(start, stop, tokens, error, again_s)

    def elsewhere(self, start: int, stop: int, tokens: int, leaving: Collection[str]) -> list[Hop]:
        try:
            hops = self.client.routes.plan(start, stop, frozenset(leaving), tokens)
        except NoRouteError:
            hops = []
        if all(map(self.client.routes.may_use, hops)) and hops:
            return hops
        self.client.known.look_soon()
        return []

    def refused(self, hop: Hop, refusal: Refusal, state: Any) -> RemoteError:
        error = RemoteError(str(refusal), hop.server.peer_id, refusal.code, refusal.retry_after_s)
        self.client.note_refusal(hop, error, self._owner)
        return error

    def failed(self, hop: Hop, state: tuple[RouteSearch, StepFailures], cost_s: float) -> None:
        service_id = hop.server.service_id
        self.client.ban(service_id, PeerUnreachableError("it has gone", service_id), cost_s)
        state[1].note(hop.server.service_id, refused=False)

    def worked(self, hop: Hop, tokens: int, seconds: float, state: tuple[RouteSearch, StepFailures]) -> None:
        times = self.client.routes.times_of(hop.server)
        times.blocks = hop.stop - hop.start
        times.observe(tokens, seconds)
        self.client.bans.worked(hop.server.service_id)
        state[0].progress()

    def left(self, hop: Hop) -> None:
        self.client.busy.has_room(hop.server.service_id)


class SimulatedClient:
    """Has requests answered over a route that is replaced where servers go."""

    def __init__(
        self,
        place: int,
        router: Router,
        model: SimulatedModel,
        assumptions: SwarmAssumptions,
        distances: Distances,
        clock: VirtualClock,
        server_of: Callable[[str], SimulatedServer | None],
        is_covered: Callable[[], bool],
    ) -> None:
        self._place, self._router, self._model = place, router, model
        self._assumptions, self._distances, self._clock = assumptions, distances, clock
        self._server_of, self._is_covered = server_of, is_covered

    async def answer(self, request: SimulatedRequest) -> SimulatedAnswer:
        """Answer one request; returns when it is answered, or lost."""
        found = SimulatedAnswer(request)
        session = _AnswerSession(self, request, found)
        try:
            await session.run()
        except NoRouteError:
            found.lost = True
            found.uncovered = not self._is_covered()
        finally:
            session.close()
        found.total_s = self._clock.now() - session.began
        return found

    # what a step costs besides computing

    def way_s(self, before: int | None, at: int, tokens: int) -> float:
        """Seconds until a server has a step's inputs.

        Args: before: the place of the server before; None = it is the first.
        """
        nbytes = tokens * self._model.hidden_bytes
        overhead = self._assumptions.prompt_overhead_s if tokens > 1 else self._assumptions.overhead_s
        if self._assumptions.relayed:
            return 2 * self._distances.seconds(self._place, at) + self._sent_s(at, nbytes) + overhead
        source = self._place if before is None else before
        return self._distances.seconds(source, at, nbytes) + overhead

    def _sent_s(self, at: int, nbytes: float) -> float:
        return 2 * nbytes / float(self._distances.bytes_per_s[self._place, at])

    def back_s(self, last: int, tokens: int) -> float:
        """Seconds until the client has the last server's outputs, of which it needs the last token's."""
        if self._assumptions.relayed:
            return 0.0
        return self._distances.seconds(last, self._place, self._model.hidden_bytes)


class _AnswerSession:
    """One answer on its way through servers."""

    def __init__(self, client: SimulatedClient, request: SimulatedRequest, answer: SimulatedAnswer) -> None:
        self._client, self._request, self._answer = client, request, answer
        self._router = client._router
        self._state = self._router.begin()
        self._hops: list[_Stage] = []
        self._told = asyncio.Event()
        self._clock = client._clock
        self.began = self._clock.now()
        self._assumptions = client._assumptions

    async def run(self) -> None:
        client, request = self._client, self._request
        blocks = client._model.size.num_blocks
        self._hops = await self._open(0, blocks, request.prompt_tokens)
        self._answer.begun = True
        self._answer.waited_s = self._clock.now() - self.began
        self._answer.route = [str(hop) for hop, *_ in self._hops]
        if self._assumptions.session_s:
            await anyio.sleep(self._assumptions.session_s)
        await self._step(request.prompt_tokens, 0)
        self._answer.first_token_s = self._clock.now() - self.began
        done = 1
        while done < request.answer_tokens:
            self._state = self._router.next_step(self._state)
            if self._assumptions.batching or self._assumptions.paged:
                await self._step(1, request.prompt_tokens + done)
                done += 1
            else:
                await self._step_aside(request.prompt_tokens + done)
                done += await self._tokens_alone(request.answer_tokens - done, request.prompt_tokens + done)

    def close(self) -> None:
        """Leave all servers."""
        self._give_back(self._hops)

    # ------------------------------------------------------------------ servers

    async def _open(self, start: int, stop: int, tokens: int, first: Sequence[Hop] = ()) -> list[_Stage]:
        """Be let in by servers of some blocks.

        Args: first: the servers that are asked first; none = they are searched for.
        """
        opened: list[_Stage] = []
        hops = list(first)
        error: RemoteError | None = None
        try:
            while not opened or hops:
                hops = hops or await self._router.find(self._state, start, stop, tokens, error, math.inf)
                hop = hops[0]
                server = self._client._server_of(hop.server.service_id)
                if server is None or server.state != "online" or server.span != _blocks_of(hop):
                    await anyio.sleep(CONNECT_S if server is None else 0.0)
                    self._router.failed(hop, self._state, CONNECT_S)
                    again_s = math.inf
                else:
                    place = server.open(hop.stop - hop.start, self._needed(tokens), self._told.set)
                    if isinstance(place, SimulatedPlace):
                        opened.append((hop, server, place))
                        hops = hops[1:]
                        continue
                    error = self._router.refused(hop, place, self._state)
                    again_s = 0.0 if opened else math.inf  # nothing was computed there yet
                found = await self._router.find(self._state, hop.start, hop.stop, tokens, error, again_s)
                if not found:
                    self._give_back(opened)
                hops = [*found, *hops[1:]] if found else []
        except BaseException:
            self._give_back(opened)
            raise
        return opened

    def _give_back(self, opened: list[_Stage]) -> None:
        for hop, server, place in opened:
            server.close(place)
            self._router.left(hop)
        opened.clear()

    def _needed(self, tokens: int) -> float:
        if self._assumptions.paged:
            return tokens
        return self._assumptions.reserved_tokens or self._request.prompt_tokens + self._request.answer_tokens

    async def _recover(self, position: int) -> None:
        """Replace the servers that have gone, and have the new ones compute what they lack."""
        self._told = asyncio.Event()
        self._state = self._router.next_step(self._state)
        for hop, server, place in list(self._hops):
            if not place.is_over:
                place.told = self._told.set
                continue
            self._answer.replaced += 1
            at = self._hops.index((hop, server, place))
            del self._hops[at]
            if server.state is None:
                self._router.failed(hop, self._state, 0.0)
            new = await self._open(hop.start, hop.stop, max(position, 1))
            self._hops[at:at] = new
            await self._replay(new, position)

    async def _replay(self, stages: Sequence[_Stage], position: int) -> None:
        """Have servers compute what they lack."""
        before = None
        for hop, server, _ in stages if position else ():
            await anyio.sleep(self._client.way_s(before, server.place, position))
            await server.compute(hop.stop - hop.start, max(position, 2))
            before = server.place

    def _leaving(self) -> list[_Stage]:
        return [one for one in self._hops if one[1].state == "leaving" and not one[2].is_over]

    async def _step_aside(self, position: int) -> None:
        """Leave servers that said they go, where others can take their place at once; stay where none can."""
        for stage in self._leaving():
            hop, server, place = stage
            names = [one.server.service_id for one, *_ in self._leaving()]
            hops = self._router.elsewhere(hop.start, hop.stop, position, names)
            new = self._open_at_once(hops, max(position, 1))
            if new:
                self._answer.replaced += 1
                server.close(place)
                at = self._hops.index(stage)
                self._hops[at : at + 1] = new
                await self._replay(new, position)

    def _open_at_once(self, hops: Sequence[Hop], tokens: int) -> list[_Stage]:
        """Be let in by all of these servers now; none if one of them does not."""
        opened: list[_Stage] = []
        for hop in hops:
            server = self._client._server_of(hop.server.service_id)
            if server is None or server.state != "online" or server.span != _blocks_of(hop):
                self._router.failed(hop, self._state, 0.0)
            else:
                place = server.open(hop.stop - hop.start, self._needed(tokens), self._told.set)
                if isinstance(place, SimulatedPlace):
                    opened.append((hop, server, place))
                    continue
                self._router.refused(hop, place, self._state)
            self._give_back(opened)
            return []
        return opened

    # ------------------------------------------------------------------ steps

    async def _step(self, tokens: int, position: int) -> None:
        """One step through all servers; again, where one is lost in it."""
        while True:
            try:
                await self._step_aside(position)
                await self._through(tokens, position)
                return
            except _LostError:  # noqa: PERF203
                await self._recover(position)

    async def _through(self, tokens: int, position: int) -> None:
        before: int | None = None
        index = 0
        while index < len(self._hops):
            began = self._clock.now()
            way_s = self._client.way_s(before, self._hops[index][1].place, tokens)
            await asyncio.sleep(way_s)
            self._check()
            if self._assumptions.paged:
                await self._grow(index, tokens, position)
            hop, server, _ = self._hops[index]
            await server.compute(hop.stop - hop.start, tokens)
            self._check()
            self._router.worked(hop, tokens, self._clock.now() - began, self._state)
            before = server.place
            index += 1
        assert before is not None
        await asyncio.sleep(self._client.back_s(before, tokens))

    def _check(self) -> None:
        if any(place.is_over for _, _, place in self._hops):
            raise _LostError

    async def _grow(self, index: int, tokens: int, position: int) -> None:
        """Have room for a step at a server; where it has none, wait for it or use others, as clients do."""
        hop, server, place = self._hops[index]
        began = self._clock.now()
        while (refusal := server.grow(place, position + tokens)) is not None:
            error = self._router.refused(hop, refusal, self._state)
            found = await self._router.find(
                self._state, hop.start, hop.stop, position + tokens, error, math.inf
            )
            self._check()
            if [(one.server.service_id, one.stop) for one in found] == [(hop.server.service_id, hop.stop)]:
                continue
            server.close(place)
            self._router.left(hop)
            del self._hops[index]
            new = await self._open(hop.start, hop.stop, position + tokens, found)
            self._hops[index:index] = new
            await self._replay(new, position)
            self._check()
            break
        self._answer.waited_s += self._clock.now() - began

    async def _tokens_alone(self, tokens: int, position: int) -> int:
        """Many single tokens, each of which takes as long as the others; returns how many were done."""
        before: int | None = None
        each = 0.0
        parts = []
        for hop, server, _ in self._hops:
            seconds = self._client.way_s(before, server.place, 1) + server.alone_s(hop.stop - hop.start, 1)
            parts.append((hop, seconds))
            each += seconds
            before = server.place
        assert before is not None
        each += self._client.back_s(before, 1)
        began = self._clock.now()
        if self._leaving():
            tokens = min(tokens, max(1, int(_LOOK_AROUND_S / each)))
        with anyio.move_on_after(tokens * each):
            await self._told.wait()
        for hop, seconds in parts:
            self._router.worked(hop, 1, seconds, self._state)
        if not self._told.is_set():
            return tokens
        done = min(tokens, int((self._clock.now() - began) / max(each, 1e-9)))
        await self._recover(position + done)
        return done


def _blocks_of(hop: Hop) -> tuple[int, int]:
    """All that its server has."""
    return hop.server.start, hop.server.stop


class _LostError(Exception):
    """A server of the route has gone."""
