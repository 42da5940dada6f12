"""What all sessions of one model share: the connection, the view of the swarm, what was learned of peers."""

from __future__ import annotations

import random
import weakref
from collections import deque
from typing import Literal

import anyio
from anyio.abc import TaskStatus

from swarmkit.client.checks.agreement import Comparison
from swarmkit.client.routing.bans import Bans
from swarmkit.client.routing.busy import BusyPeers
from swarmkit.client.routing.deadline import DeadlinePolicy, StepTimes
from swarmkit.client.routing.route import Hop
from swarmkit.client.swarm.adapter_sender import AdapterSender
from swarmkit.client.swarm.background import Background
from swarmkit.client.swarm.known_servers import KnownServers, ModelRef
from swarmkit.client.swarm.prefix_cache import ClientPrefixCache
from swarmkit.client.swarm.route_planner import RoutePlanner, claimed_per_block_s
from swarmkit.client.swarm.scout import Scout
from swarmkit.client.swarm.spares import Spares
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import NoRouteError, PeerError, RemoteError, TransportError
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
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.endpoints import connect
from swarmkit.net.rpc.listed_transport import ListedTransport
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.net.transport.seam import Transport
from swarmkit.settings import ClientSettings, NetSettings


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
        routing = self.settings.routing
        self._lists = PeerLists(routing.allowed_servers, routing.blocked_servers)
        self._transport: Transport | None = None
        self._streams: weakref.WeakSet[ClientStream] = weakref.WeakSet()
        self._stop = anyio.Event()
        self._find_better_now = anyio.Event()
        self._owners = 0
        self._peer_id = ""
        times: dict[str, StepTimes] = {}
        self.known = KnownServers(model, routing, self._lists, self.bans, times, clock, self._random)
        """The servers of the model."""
        self.routes = RoutePlanner(
            servers=self.known.servers,
            may_push=lambda: self.settings.transfer.push,
            bans=self.bans,
            busy=self.busy,
            events=self.events,
            times=times,
            clock=clock,
        )
        """Chooses among them."""
        self.scout = Scout(
            fingerprint=model.fingerprint,
            hidden_size=model.hidden_size,
            connect=self.connect,
            servers=self.known.servers,
            shown=self.routes.shown,
            times_of=self.routes.times_of,
            bans=self.bans,
            busy=self.busy,
            clock=clock,
            untried_wait_s=self.settings.deadlines.untried_wait_s,
            salt=self.routes.salt,
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
        self._transport = ListedTransport(transport, self._lists)
        self._peer_id = transport.peer_id
        try:
            with transport.deal_with(self._lists):
                await self.known.begin(registry, self._peer_id)
                task_status.started()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self.known.run)
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

    def find_better_soon(self) -> None:
        """Have servers tried that promise much more than those in use; does not wait for it."""
        self._find_better_now.set()

    async def _find_better_forever(self) -> None:
        while True:
            await self._find_better_now.wait()
            self._find_better_now = anyio.Event()
            try:
                hops = self.routes.plan(0, self.model.num_blocks)
            except NoRouteError:
                continue
            shown = [self.routes.shown(hop.server.service_id) for hop in hops]
            seconds = [one.seconds for one in shown if one is not None]
            if len(seconds) == len(hops):
                await self.scout.find_better(sum(seconds) / self.model.num_blocks, claimed_per_block_s)

    def _spares_wanted(self) -> list[Announcement]:
        """The servers that would take the place of those in use, best first; none if no session was begun."""
        if not self._owners:
            return []
        try:
            used = self.routes.plan(0, self.model.num_blocks)
        except NoRouteError:
            return []
        in_use = frozenset(hop.server.service_id for hop in used)
        found: dict[str, Announcement] = {}
        for hop in used:
            try:
                others = self.routes.plan(hop.start, hop.stop, in_use)
            except NoRouteError:
                continue
            spare = filter(self.routes.may_use, others)
            found.update((other.server.service_id, other.server) for other in spare)
        return list(found.values())

    def _note_spare(self, server: Announcement, outcome: float | PeerError) -> None:
        """A server that is kept as a spare answered after so many seconds, or did not."""
        if isinstance(outcome, PeerError):
            self.bans.failed(server.service_id, error=outcome)
        else:
            self.routes.times_of(server).way_s = outcome

    # ------------------------------------------------------------------ routes and peers

    @property
    def connect_timeout(self) -> float:
        """Seconds to reach a peer."""
        return self.net_settings.connect_timeout_s

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
        for each in (server, *(one for one in self.known.allowed() if one.peer_id == server.peer_id)):
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


def _reason(error: PeerError) -> str:
    if error.is_loss:
        return "connection lost"
    if isinstance(error, RemoteError):
        return f"{error.code}: {error}"
    return str(error)
