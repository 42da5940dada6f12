"""What all sessions of one model share: the connection, the view of the swarm, and what was learned of peers."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import anyio
from anyio.abc import TaskStatus

from swarmkit.client.bans import Bans
from swarmkit.client.deadline import DeadlinePolicy, StepTimes
from swarmkit.client.routing import Hop, find_route, no_route, route_cost
from swarmkit.client.trace import SessionEvent, StepTrace
from swarmkit.errors import PeerTimeoutError, ProtocolError, RemoteError, SwarmkitError
from swarmkit.net import records
from swarmkit.net.connect import TransportFactory
from swarmkit.net.conversation import Conversation
from swarmkit.net.identity import Identity
from swarmkit.net.messages import SESSION_ENDPOINT, AskInfo, Fault, Info
from swarmkit.net.records import Announcement
from swarmkit.net.registry import Registry
from swarmkit.net.swarm_map import SwarmMap
from swarmkit.net.transport import Transport
from swarmkit.settings import ClientSettings, NetSettings

logger = logging.getLogger(__name__)

_ASSUMED_ROUND_TRIP_S = 0.02
_EVENTS = 256


@dataclass(frozen=True)
class ModelRef:
    """Which model the servers must serve."""

    name: str
    fingerprint: str
    num_blocks: int
    hidden_size: int


class SwarmClient:
    """This program's membership in a model's swarm. Everything here runs on the event loop's thread."""

    def __init__(
        self,
        model: ModelRef,
        transport_factory: TransportFactory,
        settings: ClientSettings | None = None,
        net_settings: NetSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self.settings = settings or ClientSettings()
        self.view = SwarmMap()
        self.trace: deque[StepTrace] = deque(maxlen=self.settings.trace_steps)
        self.events: deque[SessionEvent] = deque(maxlen=_EVENTS)
        self.listeners: list[Callable[[SessionEvent], None]] = []
        self.bans = Bans(self.settings.ban_seconds, self.settings.max_ban_seconds, clock)
        self.policy = DeadlinePolicy(
            self.settings.first_step_timeout, self.settings.min_step_timeout, self.settings.deadline_factor
        )
        self._clock = clock
        self._factory = transport_factory
        self._net = net_settings or NetSettings()
        self._times: dict[str, StepTimes] = {}
        self._transport: Transport | None = None
        self._registry: Registry | None = None
        self._stop = anyio.Event()
        self._cost = route_cost(
            round_trip_s=self._round_trip_s, penalty_s=self.bans.penalty_s, salt=secrets.token_hex(4)
        )

    # ------------------------------------------------------------------ life

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Be a member of the swarm until `request_stop`."""
        self._transport = await self._factory(
            Identity(), lambda key, subkey, value: records.is_acceptable(key, subkey, value, self._clock())
        )
        try:
            self._registry = Registry(self._transport, self._clock)
            await self.refresh()
            task_status.started()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._refresh_forever)
                await self._stop.wait()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._transport.close()

    def request_stop(self) -> None:
        """Leave the swarm; open sessions end."""
        self._stop.set()

    async def refresh(self) -> SwarmMap:
        """Look up who serves the model now."""
        assert self._registry is not None
        found = await self._registry.look_up(self.model.fingerprint, self.model.num_blocks)
        self.view = self.view.without_expired(self._clock()).apply(*found.announcements.values())
        return self.view

    async def _refresh_forever(self) -> None:
        while True:
            await anyio.sleep(self.settings.refresh_period)
            try:
                await self.refresh()
            except SwarmkitError as error:
                logger.warning("could not look up the swarm, will try again: %s", error)

    # ------------------------------------------------------------------ routes and peers

    def plan(self, start: int, stop: int, without: frozenset[str] = frozenset()) -> list[Hop]:
        """The best route for blocks [start, stop) in the view as it is; peers in `without` are not used.

        Raises:
            NoRouteError: nobody serves some of them.
        """
        servers = [s for s in self.view.servers(self._clock()) if s.peer_id not in without]
        return find_route(start, stop, servers, self._cost)

    def no_route(self, start: int, stop: int) -> Exception:
        """The error that says which of these blocks nobody serves now."""
        return no_route(start, stop, self.view.servers(self._clock()))

    def times_of(self, server: Announcement) -> StepTimes:
        """How long this server's steps take, as seen by all sessions here."""
        if server.peer_id not in self._times:
            self._times[server.peer_id] = StepTimes(server.throughput)
        return self._times[server.peer_id]

    def emit(self, event: SessionEvent) -> None:
        """Keep an event, log it in one line, and tell whoever listens."""
        self.events.append(event)
        logger.info("%s", event)
        for listener in list(self.listeners):
            listener(event)

    async def converse(self, server: Announcement, max_payload_bytes: int = 0) -> Conversation:
        """Open a stream to a server.

        Raises:
            PeerError: it cannot be reached in time.
        """
        assert self._transport is not None
        stream = await self._transport.open(
            server.peer_id, SESSION_ENDPOINT, server.addresses, self._net.connect_timeout
        )
        return Conversation(stream, max_payload_bytes)

    async def info(self, server: Announcement) -> Info:
        """Ask a server what it is doing.

        Raises:
            PeerError: it cannot be reached, or answered with something else.
        """
        conversation = await self.converse(server)
        try:
            with anyio.fail_after(self._net.connect_timeout):
                await conversation.send(AskInfo())
                reply = (await conversation.receive()).message
        except TimeoutError:
            raise PeerTimeoutError(f"{server.label} did not answer in time", server.peer_id) from None
        finally:
            conversation.close()
        if isinstance(reply, Fault):
            raise RemoteError(reply.message, server.peer_id, reply.code)
        if not isinstance(reply, Info):
            raise ProtocolError(f"expected Info, got {type(reply).__name__}", server.peer_id)
        return reply

    def _round_trip_s(self, peer_id: str) -> float:
        times = self._times.get(peer_id)
        return (times.round_trip_s if times else None) or _ASSUMED_ROUND_TRIP_S
