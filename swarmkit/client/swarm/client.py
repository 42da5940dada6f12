"""What all sessions of one model share: the connection, the view of the swarm, what was learned of peers."""

from __future__ import annotations

import logging
import math
import random
import secrets
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import anyio
from anyio.abc import TaskStatus

from swarmkit.client.checks.agreement import Comparison
from swarmkit.client.routing.bans import Bans
from swarmkit.client.routing.busy import BusyPeers
from swarmkit.client.routing.candidates import best_of_each_block, within_bounds
from swarmkit.client.routing.claims import Shown, counted_per_block
from swarmkit.client.routing.deadline import DeadlinePolicy, StepTimes
from swarmkit.client.routing.detours import detours
from swarmkit.client.routing.route import (
    Cost,
    Hop,
    find_route,
    left_out,
    lost_contact,
    no_route,
    route_cost,
    shut_out,
)
from swarmkit.client.routing.step_failures import StepFailures
from swarmkit.client.swarm.adapter_sender import AdapterSender
from swarmkit.client.swarm.background import Background
from swarmkit.client.swarm.prefix_cache import ClientPrefixCache
from swarmkit.client.swarm.scout import Scout
from swarmkit.client.swarm.spares import Spares
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import (
    NoContactError,
    NoRouteError,
    PeerError,
    RemoteError,
    SwarmkitError,
    TransportError,
)
from swarmkit.events import (
    EventStream,
    LogitsServed,
    MicroBatchFinished,
    OutputsDiffered,
    Owner,
    PeerLost,
    PeerRefused,
    StepFinished,
)
from swarmkit.net.protocol.messages import SESSION
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.registry.swarm_map import SwarmMap, uncovered
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.endpoints import connect
from swarmkit.net.rpc.listed_transport import ListedTransport
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.net.transport.seam import Transport
from swarmkit.settings import ClientSettings, NetSettings

logger = logging.getLogger(__name__)

_OTHERS_TIMEOUT_S = 5.0

_ASSUMED_ROUND_TRIP_S = 0.02
_LOOK_PAUSE_S = 0.5
_UNLINKED_S = 600.0
_PROMPT_TOKENS = 128


@dataclass(frozen=True)
class ModelRef:
    """Which model the servers must serve."""

    name: str
    fingerprint: str
    num_blocks: int
    hidden_size: int


class SwarmClient:
    """Uses the servers of one model; a part of a `Node`. Everything here runs on the event loop's thread."""

    def __init__(
        self,
        model: ModelRef,
        settings: ClientSettings | None = None,
        net_settings: NetSettings | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.model = model
        self.settings = settings or ClientSettings()
        self.view = SwarmMap()
        self.clock = clock
        steps = self.settings.sessions.trace_steps
        self.events = EventStream(apart={StepFinished: steps, MicroBatchFinished: steps, LogitsServed: steps})
        self.bans = Bans(self.settings.routing.ban_s, self.settings.routing.max_ban_s, clock.now)
        self.busy = BusyPeers(clock.now)
        self.policy = DeadlinePolicy(
            self.settings.deadlines.first_step_timeout_s,
            self.settings.deadlines.min_step_timeout_s,
            self.settings.deadlines.deadline_factor,
        )
        self.checks = Background()
        self._random = random.Random()
        self.chance = self._random.random
        """Between 0 and 1: a generator of this client's own, which peers cannot foresee."""
        self.adapters = AdapterSender(model.fingerprint, self.policy.first_s, self.connect)
        self.prefix_cache = ClientPrefixCache(self.settings.sessions.prefix_cache_bytes)
        self.net_settings = net_settings or NetSettings()
        self.rates: dict[tuple[str, str], float] = {}
        """Bytes per second from one peer to another, as far as measured; "" is this client."""
        self.times: dict[str, StepTimes] = {}
        """How long steps took at each server that was used, by service id."""
        self._unlinked: dict[tuple[str, str], float] = {}
        routing = self.settings.routing
        self._lists = PeerLists(routing.allowed_servers, routing.blocked_servers)
        self._transport: Transport | None = None
        self._streams: weakref.WeakSet[ClientStream] = weakref.WeakSet()
        self._registry: Registry | None = None
        self._other_models: list[str] = []
        self._stop = anyio.Event()
        self._look_now = anyio.Event()
        self._find_better_now = anyio.Event()
        self._looking = anyio.Lock()
        self.looks = 0
        """How often it has looked who serves."""
        self._looked_at = clock.time()
        self._no_contact: NoContactError | None = None
        self._owners = 0
        self._peer_id = ""
        self.salt = secrets.token_hex(4)
        """Spreads clients over servers that are equally good."""
        self.scout = Scout(
            fingerprint=model.fingerprint,
            hidden_size=model.hidden_size,
            connect=self.connect,
            servers=self.servers,
            shown=self._shown,
            times_of=self.times_of,
            bans=self.bans,
            busy=self.busy,
            clock=clock,
            untried_wait_s=self.settings.deadlines.untried_wait_s,
            salt=self.salt,
        )

        self.spares = Spares(
            connect=self.connect,
            wanted=self._spares_wanted,
            note=self._note_spare,
            period_s=self.settings.routing.refresh_period_s,
            clock=clock,
        )
        """Streams to servers that would be used next if one in use were lost."""

    # ------------------------------------------------------------------ life

    @property
    def peer_id(self) -> str:
        """Of the peer whose part it is; empty before it runs."""
        return self._peer_id

    @property
    def transport(self) -> Transport:
        """The transport that it runs over.

        Raises:
            TransportError: it does not run any more.
        """
        if self._transport is None:
            raise TransportError("this client has left the swarm; load the model again")
        return self._transport

    async def run(
        self,
        *,
        transport: Transport,
        registry: Registry,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Use the swarm that a transport reaches, until `request_stop`."""
        self._transport, self._registry = ListedTransport(transport, self._lists), registry
        self._peer_id = transport.peer_id
        try:
            with transport.deal_with(self._lists):
                await self.refresh()
                task_status.started()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._refresh_forever)
                    tasks.start_soon(self._find_better_forever)
                    if self.settings.routing.spares:
                        tasks.start_soon(self.spares.run)
                    tasks.start_soon(self.checks.run)
                    await self._stop.wait()
                    tasks.cancel_scope.cancel()
        finally:
            self._transport = None
            for stream in list(self._streams):
                stream.close()
            self.events.close()

    def request_stop(self) -> None:
        """Leave the swarm; open sessions end."""
        self._stop.set()

    async def refresh(self) -> SwarmMap:
        """Look up the servers of the model."""
        assert self._registry is not None
        looks = self.looks
        async with self._looking:
            if self.looks == looks:  # else another call began to look meanwhile, and has the answer
                self.looks += 1
                asked_at = self.clock.now()
                try:
                    model = self.model
                    found = await self._registry.look_up(model.fingerprint, model.num_blocks, self.times)
                except NoContactError as error:
                    self._no_contact = error
                    raise
                self._no_contact = None
                self._looked_at = self.clock.time()
                view = self.view.without_expired(self._looked_at).apply(*found.announcements.values())
                self.view = within_bounds(view, self.times, self._random)
                self.bans.heard(self.view.announcements, asked_at)
        return self.view

    async def look(self) -> list[Announcement]:
        """All servers of the model, as they are now."""
        return list((await self.refresh()).servers(self.clock.time()))

    def look_soon(self) -> None:
        """Have the swarm looked up before the usual time; does not wait for it."""
        self._look_now.set()

    async def _refresh_forever(self) -> None:
        while True:
            with anyio.move_on_after(self.settings.routing.refresh_period_s):
                await self._look_now.wait()
            try:
                await self.refresh()
            except SwarmkitError as error:
                logger.warning("could not look up the swarm, will try again: %s", error)
            self._look_now = anyio.Event()
            await anyio.sleep(min(_LOOK_PAUSE_S, self.settings.routing.refresh_period_s))

    def find_better_soon(self) -> None:
        """Have servers tried that promise much more than those in use; does not wait for it."""
        self._find_better_now.set()

    async def _find_better_forever(self) -> None:
        while True:
            await self._find_better_now.wait()
            self._find_better_now = anyio.Event()
            try:
                hops = self.plan(0, self.model.num_blocks)
            except NoRouteError:
                continue
            shown = [self._shown(hop.server.service_id) for hop in hops]
            seconds = [one.seconds for one in shown if one is not None]
            if len(seconds) == len(hops):
                await self.scout.find_better(sum(seconds) / self.model.num_blocks, _claimed_per_block_s)

    def _spares_wanted(self) -> list[Announcement]:
        """The servers that would take the place of those in use, best first; none if no session was begun."""
        if not self._owners:
            return []
        try:
            used = self.plan(0, self.model.num_blocks)
        except NoRouteError:
            return []
        in_use = frozenset(hop.server.service_id for hop in used)
        found: dict[str, Announcement] = {}
        for hop in used:
            try:
                others = self.plan(hop.start, hop.stop, in_use)
            except NoRouteError:
                continue
            found.update((other.server.service_id, other.server) for other in filter(self.may_use, others))
        return list(found.values())

    def _note_spare(self, server: Announcement, outcome: float | PeerError) -> None:
        """A server that is kept as a spare answered after so many seconds, or did not."""
        if isinstance(outcome, PeerError):
            self.bans.failed(server.service_id, error=outcome)
        else:
            self.times_of(server).way_s = outcome

    # ------------------------------------------------------------------ routes and peers

    @property
    def connect_timeout(self) -> float:
        """Seconds to reach a peer."""
        return self.net_settings.connect_timeout_s

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
        servers = [server for server in self.servers(hosted_adapter) if server.service_id not in without]
        cost = self._cost(servers, tokens, failures or StepFailures())
        candidates = best_of_each_block(start, stop, servers, cost, self.salt)
        longer = detours(self.trace, candidates, self.way_s) if self.settings.transfer.push else None
        return find_route(start, stop, candidates, cost, longer)

    def seconds(self, hops: Sequence[Hop], tokens: int = 0) -> float:
        """What a token over a route costs, as `plan` compares routes: in seconds, with all that speaks
        against a server.
        """
        cost = self._cost(self.servers(), tokens, StepFailures())
        longer = detours(self.trace, [hop.server for hop in hops], self.way_s)
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

    def _cost(self, servers: Sequence[Announcement], tokens: int, failed: StepFailures) -> Cost:
        return route_cost(
            round_trip_s=self.way_s,
            penalty_s=lambda service_id: self.bans.penalty_s(service_id) + failed.penalty_s(service_id),
            wait_s=self.busy.wait_s,
            tokens=tokens,
            salt=self.salt,
            shown=self._shown,
            best_s=min(
                (
                    counted_per_block(_claimed_work_s(server, shown.blocks), shown)
                    for server in servers
                    if not self.bans.is_banned(server.service_id)
                    and (shown := self._shown(server.service_id)) is not None
                ),
                default=0.0,
            ),
        )

    def way_s(self, service_id: str) -> float:
        """Seconds to a server and back that computes nothing, measured or assumed."""
        times = self.times.get(service_id)
        return (times.way_s if times else 0.0) or _ASSUMED_ROUND_TRIP_S

    def _shown(self, service_id: str) -> Shown | None:
        times = self.times.get(service_id)
        return None if times is None else times.shown

    def may_use(self, hop: Hop) -> bool:
        """Whether nothing is known that speaks against a server: it has not failed lately, nor is it busy."""
        service_id = hop.server.service_id
        return not self.bans.is_doubtful(service_id) and not self.busy.wait_s(service_id)

    def ban(self, service_id: str, error: PeerError, cost_s: float = 0.0) -> None:
        """Avoid a server for a while, and use nothing any more that it took part in.

        Args:
            error: how it failed.
            cost_s: seconds that its failure took to see.
        """
        self.bans.failed(service_id, cost_s, error)
        self.prefix_cache.drop(service_id)

    def convict(self, server: Announcement) -> None:
        """Leave a peer aside for long, whose outputs were found wrong, with all servers that it runs."""
        for each in (server, *(one for one in self._known() if one.peer_id == server.peer_id)):
            self.bans.convict(each.service_id, self.settings.checks.check_ban_s)
            self.prefix_cache.drop(each.service_id)

    async def clear_prefix_cache(self) -> None:
        """Forget what sessions that have ended left."""
        self.prefix_cache.clear()

    def note_refusal(self, hop: Hop, error: RemoteError, owner: Owner) -> None:
        """Leave a server alone for as long as it said that it has no room, and tell so."""
        server = hop.server
        seconds = self.busy.note(server.service_id, error.retry_after_s)
        self.events.emit(
            PeerRefused(
                server.peer_id,
                server.label,
                hop.start,
                hop.stop,
                str(error),
                seconds,
                time=self.clock.time(),
                owner=owner,
            )
        )

    def note_loss(self, hop: Hop, cause: PeerError | str, owner: Owner) -> None:
        """Tell that a server failed or leaves.

        Args: cause: the error, or what people are told about it.
        """
        server = hop.server
        self.events.emit(
            PeerLost(
                server.peer_id,
                server.label,
                hop.start,
                hop.stop,
                cause if isinstance(cause, str) else _reason(cause),
                time=self.clock.time(),
                owner=owner,
            )
        )

    def note_difference(self, found: Comparison, excess: float, owner: Owner, loser: str = "") -> None:
        """Tell that two servers computed different outputs for the same inputs.

        Args:
            excess: how far these are apart; see `agreement.excess`.
            loser: the peer that is left aside for it.
        """
        first, second = found.first.server, found.second.server
        self.events.emit(
            OutputsDiffered(
                (first.peer_id, second.peer_id),
                (first.label, second.label),
                found.first.start,
                found.first.stop,
                excess,
                loser,
                time=self.clock.time(),
                owner=owner,
            )
        )

    def new_owner(self, kind: Literal["session", "training"]) -> Owner:
        """A name for a session or a call of training in events."""
        self._owners += 1
        return Owner(kind, self._peer_id, self._owners)

    @property
    def trace(self) -> deque[StepFinished]:
        """The last steps of all sessions, oldest first."""
        return self.events.kept(StepFinished)

    def _known(self) -> list[Announcement]:
        """The servers in the view that the user allows; those at its loss where there is no contact."""
        now = self.clock.time() if self._no_contact is None else self._looked_at
        return [server for server in self.view.servers(now) if self._lists.admit(server.peer_id)]

    def servers(self, hosted_adapter: str = "") -> list[Announcement]:
        """Those in the view as it is that may be used.

        Args: hosted_adapter: for sessions and passes with the hosted adapter of this hash.
        """
        wanted = self.settings.routing.precisions
        servers = [s for s in self._known() if not wanted or s.dtype in wanted]
        if hosted_adapter:
            servers = [s for s in servers if any(one.name == hosted_adapter for one in s.adapters)]
        return servers

    def unserved(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """The blocks that no server has, apart from peers that are avoided because they failed."""
        servers = [s for s in self._known() if not self.bans.is_banned(s.service_id)]
        return tuple(self._uncovered(start, stop, servers))

    def no_route(self, start: int, stop: int) -> Exception:
        """The error that says which of these blocks no server has now, or that this client cannot know it."""
        if self._no_contact is not None:
            return lost_contact(start, stop, self._no_contact.since)
        missing = self._uncovered(start, stop, self._known())
        there = self._uncovered(start, stop, self.view.servers(self.clock.time()))
        if missing and missing != there:
            return left_out(missing)
        return no_route(start, stop, self._known(), self.model.name, self._other_models)

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
        others = [one for one in self.servers(hosted_adapter) if not self.bans.excludes(one.service_id)]
        if missing := self._uncovered(start, stop, others):
            raise shut_out(missing, self._peer_id, error) from error

    @staticmethod
    def _uncovered(start: int, stop: int, servers: Sequence[Announcement]) -> list[tuple[int, int]]:
        return uncovered(start, stop, [(server.start, server.stop) for server in servers])

    @property
    def has_contact(self) -> bool:
        """Whether other peers of the swarm answered the latest look-up."""
        return self._no_contact is None

    async def look_for_other_models(self) -> None:
        """Where no server of the model is known, find out what the swarm serves instead, for the error."""
        if (
            list(self.view.servers(self.clock.time()))
            or self._no_contact is not None
            or self._registry is None
        ):
            return
        try:
            with anyio.move_on_after(_OTHERS_TIMEOUT_S):
                found = await self._registry.look_up_all()
                self._other_models = sorted({each.model for each in found.servers(self.clock.time())})
        except SwarmkitError as error:
            logger.debug("could not look up the swarm's models: %s", error)

    def times_of(self, server: Announcement) -> StepTimes:
        """How long this server's steps take, as seen by all sessions here."""
        if server.service_id not in self.times:
            self.times[server.service_id] = StepTimes(server.throughput)
        return self.times[server.service_id]

    def may_link(self, server: Announcement, following: Announcement) -> bool:
        """Whether one server may hand its outputs on to the other, as far as is known."""
        pair = (server.service_id, following.service_id)
        return self.settings.transfer.push and self._unlinked.get(pair, -math.inf) <= self.clock.now()

    def cannot_link(self, server: Announcement, following: Announcement) -> None:
        """Note that it cannot, or did it badly; it is asked again after a while."""
        now = self.clock.now()
        self._unlinked = {pair: until for pair, until in self._unlinked.items() if until > now}
        self._unlinked[server.service_id, following.service_id] = now + _UNLINKED_S

    async def connect(self, server: Announcement, protocol: Protocol) -> ClientStream:
        """Open a stream to a server.

        Raises:
            PeerError: it cannot be reached in time, or speaks another protocol version.
        """
        if protocol is SESSION and (warm := self.spares.take(server)) is not None:
            return warm
        stream = await connect(
            self.transport,
            protocol,
            server.peer_id,
            server.addresses,
            self.net_settings.connect_timeout_s,
            service=server.service,
            versions=server.protocols,
            clock=self.clock.now,
        )
        self._streams.add(stream)
        return stream

    def round_trip_s(self, peer_id: str) -> float:
        """Measured or assumed seconds to a peer and back."""
        times = self.times.get(peer_id)
        return (times.round_trip_s if times else None) or _ASSUMED_ROUND_TRIP_S


def _claimed_work_s(server: Announcement, blocks: int) -> float:
    return blocks / (server.stop - server.start) / max(server.throughput, 1e-3)


def _claimed_per_block_s(server: Announcement) -> float:
    return (_ASSUMED_ROUND_TRIP_S + 1 / max(server.throughput, 1e-3)) / (server.stop - server.start)


def _reason(error: PeerError) -> str:
    if error.is_loss:
        return "connection lost"
    if isinstance(error, RemoteError):
        return f"{error.code}: {error}"
    return str(error)
