"""One call, forward or back: its micro-batches go through the swarm at the same time.

One loop gives them out. A micro-batch is planned when it is its turn, by what is known then of the servers:
their pace, what they have been sent, and which of them failed. So replicas share the work in proportion to
their measured throughput, stages of a chain work on different micro-batches at once, and a lost server costs
its own part only::

    ready ──(a server has room)──> asked ──(answer)──> ready for the next blocks, or done
      └──────────────(server lost: banned, planned again)──┘
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
import anyio.abc
import torch

from swarmkit.client.gradients.codecs import CodecChoice, Way
from swarmkit.client.gradients.exchange import Line, Traffic
from swarmkit.client.gradients.flows import Direction, Flow, PassRequest
from swarmkit.client.gradients.plan import IN_FLIGHT, Paces, claimed_pace, finish_cost
from swarmkit.client.routing.deadline import StepTimes
from swarmkit.client.routing.route import Hop, find_route
from swarmkit.client.routing.step_failures import StepFailures
from swarmkit.client.session.codecs import CLIENT
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.errors import (
    NoRouteError,
    PeerError,
    PeerTimeoutError,
    RemoteError,
    SwarmkitError,
)
from swarmkit.events import MicroBatchFinished, WaitStarted
from swarmkit.net.protocol.codec import CodecName
from swarmkit.net.protocol.gradient_messages import GRADIENT
from swarmkit.net.protocol.messages import SENDERS_FAULT
from swarmkit.net.registry.records import Announcement

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class Training:
    """What all calls of one client share: what was learnt of servers, and what was sent."""

    def __init__(self) -> None:
        self.paces: dict[Direction, Paces] = {"forward": Paces(), "backward": Paces()}
        self.traffic = Traffic()
        self.codecs: dict[Way, CodecName] = {}
        """What was chosen last for each link."""
        self._times: dict[tuple[str, Direction], StepTimes] = {}

    def times_of(self, server: Announcement, direction: Direction) -> StepTimes:
        """How long a server's answers take, by units."""
        key = server.service_id, direction
        if key not in self._times:
            self._times[key] = StepTimes(1.0 / claimed_pace(server))
        return self._times[key]


@dataclass
class _Place:
    """A server in this call."""

    units: dict[Flow, tuple[Direction, int]] = field(default_factory=dict)
    """That it was sent, and has not answered yet."""
    idle: list[Line] = field(default_factory=list)
    answered_at: float = 0.0


@dataclass(eq=False)
class _Stuck:
    """A micro-batch that no server can take, except those that failed lately."""

    give_up_at: float
    pause_s: float = _FIRST_PAUSE_S
    looked: bool = False


class _Progress:
    """What `MicroBatchFinished` will tell of a micro-batch."""

    def __init__(self, flow: Flow, began_at: float) -> None:
        self.began_at = began_at
        self.direction = flow.direction
        self.blocks = flow.blocks
        self.tokens = flow.tokens
        self.route: list[str] = []
        self.lost = 0


class Call:
    """The micro-batches of one call, until all are done."""

    def __init__(
        self, swarm: SwarmClient, training: Training, flows: Sequence[Flow], hosted_adapter: str = ""
    ) -> None:
        """Args: hosted_adapter: use only servers that host the adapter of this hash."""
        self._hosted_adapter = hosted_adapter
        self._swarm = swarm
        self._training = training
        self._owner = swarm.new_owner("training")
        self._flows = sorted(flows, key=lambda flow: flow.index)
        self._progress = {flow.index: _Progress(flow, swarm.clock.now()) for flow in flows}
        self._asked: set[int] = set()
        """Micro-batches that are at a server, by index."""
        self._places: defaultdict[str, _Place] = defaultdict(_Place)
        self._failures: defaultdict[int, StepFailures] = defaultdict(StepFailures)
        """Of the request that a micro-batch is at, by index."""
        self._worked: set[str] = set()
        """Servers that did something in this call, by service id."""
        self._stuck: dict[int, _Stuck] = {}
        self._looking = False
        self._last_loss: tuple[Hop, PeerError] | None = None
        self._error: BaseException | None = None
        self._changed = anyio.Event()

    async def run(self) -> None:
        """Bring all micro-batches to their end.

        Raises:
            NoRouteError: no server had some blocks for `route_timeout_s` seconds, or all that have them
                refuse this client altogether.
            RemoteError: a micro-batch is malformed, by the rule of `StepFailures`.
        """
        try:
            async with anyio.create_task_group() as tasks:
                while self._error is None and any(flow.wanted for flow in self._flows):
                    self._changed = anyio.Event()
                    for flow in self._flows:
                        if flow.wanted is None or flow.index in self._asked:
                            continue
                        hop = self._place(flow)
                        if hop is not None:
                            self._ask(flow, hop, tasks)
                    if self._stuck and not self._looking:
                        self._looking = True
                        tasks.start_soon(self._look)
                    await self._wait()
                tasks.cancel_scope.cancel()
        finally:
            for place in self._places.values():
                for line in place.idle:
                    line.close()
        if self._error is not None:
            raise self._error

    # ------------------------------------------------------------------ which server takes what

    def _place(self, flow: Flow) -> Hop | None:
        """Where a micro-batch goes next, if it can go there now."""
        assert flow.wanted is not None
        start, stop = flow.wanted
        try:
            hop = self._plan(flow, start, stop)
        except NoRouteError:
            hop = None
        if hop is None or self._is_avoided(flow, hop.server.service_id):
            stuck = self._stuck.get(flow.index)
            if stuck is None:
                timeout = self._swarm.settings.routing.route_timeout_s
                self._stuck[flow.index] = _Stuck(self._swarm.clock.now() + timeout)
                self._swarm.events.emit(
                    WaitStarted(
                        self._swarm.known.unserved(start, stop),
                        timeout,
                        time=self._swarm.clock.time(),
                        owner=self._owner,
                    )
                )
                return None
            if hop is None or not stuck.looked:
                return None
            stuck.looked = False
        if len(self._places[hop.server.service_id].units) >= IN_FLIGHT:
            return None
        return hop

    def _is_avoided(self, flow: Flow, service_id: str) -> bool:
        return self._swarm.bans.is_banned(service_id) or self._failures[flow.index].has_failed(service_id)

    def _plan(self, flow: Flow, start: int, stop: int) -> Hop:
        """The first hop of the way on which the micro-batch is done earliest, as things stand."""
        swarm, failures = self._swarm, self._failures[flow.index]
        servers = swarm.known.servers(self._hosted_adapter)
        claims = {server.service_id: claimed_pace(server) for server in servers}
        paces = {kind: paces.of(claims) for kind, paces in self._training.paces.items()}

        def backlog_s(service_id: str) -> float:
            waiting = self._places[service_id].units.values() if service_id in self._places else ()
            return sum(paces[kind].get(service_id, 0.0) * units for kind, units in waiting)

        cost = finish_cost(
            tokens=flow.tokens,
            pace_s=paces[flow.direction].__getitem__,
            backlog_s=backlog_s,
            round_trip_s=swarm.routes.round_trip_s,
            penalty_s=lambda service_id: swarm.bans.penalty_s(service_id) + failures.penalty_s(service_id),
            salt=swarm.routes.salt,
            kept_by=flow.kept_by,
        )
        hop = find_route(start, stop, servers, cost)[0]
        most = flow.most_blocks()
        return hop if most is None else Hop(hop.server, hop.start, min(hop.stop, hop.start + most))

    # ------------------------------------------------------------------ one request

    def _ask(self, flow: Flow, hop: Hop, tasks: anyio.abc.TaskGroup) -> None:
        question = flow.question(hop.start, hop.stop)
        self._asked.add(flow.index)
        self._places[hop.server.service_id].units[flow] = question.direction, question.units
        tasks.start_soon(self._exchange, flow, hop)

    async def _exchange(self, flow: Flow, hop: Hop) -> None:
        service_id = hop.server.service_id
        place = self._places[service_id]
        question = flow.question(hop.start, hop.stop)
        direction, units = question.direction, question.units
        times = self._training.times_of(hop.server, direction)
        # What was sent there before is done before.
        backlog = sum(units for _, units in place.units.values())
        deadline_s = times.deadline_s(backlog, self._swarm.policy)
        asked_at = self._swarm.clock.now()
        line: Line | None = None
        try:
            line = place.idle.pop() if place.idle else await self._open(hop.server)
            if question.adapter is not None:
                await self._swarm.adapters.ensure(hop.server, question.adapter)
                asked_at = self._swarm.clock.now()
            if line.codecs:
                usual_s = times.usual_s(units)
                choice = CodecChoice(self._swarm, hop.server, line.codecs, self._training.codecs, usual_s)
                question = choice.apply(question)
            answer, of_adapter = await self._ask_line(line, hop.server, question, deadline_s)
            flow.take(question, answer, of_adapter, service_id)
            now = self._swarm.clock.now()
            seconds = now - max(asked_at, place.answered_at)
            place.answered_at = now
            times.observe(units, seconds)
            self._training.paces[direction].observe(service_id, units, seconds)
            self._swarm.bans.worked(service_id)
            self._worked.add(service_id)
            self._failures.pop(flow.index, None)
            self._stuck.pop(flow.index, None)
            self._note(flow, hop)
            place.idle.append(line)
            line = None
        except PeerError as error:
            if isinstance(error, PeerTimeoutError):
                times.timed_out()
            self._lost(flow, hop, error, self._swarm.clock.now() - asked_at)
        except SwarmkitError as error:
            self._error = error
        finally:
            if line is not None:
                line.close()
            place.units.pop(flow, None)
            self._asked.discard(flow.index)
            self._changed.set()

    async def _ask_line(
        self, line: Line, server: Announcement, question: PassRequest, deadline_s: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ask; once more where the server has not kept the adapter."""
        fingerprint, adapters = self._swarm.model.fingerprint, self._swarm.adapters
        try:
            answer, of_adapter, rate = await line.ask(fingerprint, question, deadline_s)
        except RemoteError as error:
            if error.code != "no_adapter" or question.adapter is None:
                raise
            adapters.forget(server, question.adapter_name)
            await adapters.ensure(server, question.adapter)
            answer, of_adapter, rate = await line.ask(fingerprint, question, deadline_s)
        if rate:
            self._swarm.rates[CLIENT, server.peer_id] = rate
        if seen := line.stream.speed.bytes_per_s:
            self._swarm.rates[server.peer_id, CLIENT] = seen
        return answer, of_adapter

    async def _open(self, server: Announcement) -> Line:
        line = Line(await self._swarm.connect(server, GRADIENT), self._training.traffic)
        if self._swarm.settings.transfer.codecs:
            try:
                await line.agree(self._swarm.connect_timeout)
            except BaseException:
                line.close()
                raise
        return line

    def _lost(self, flow: Flow, hop: Hop, error: PeerError, cost_s: float) -> None:
        """A server failed: its part of this micro-batch is for another one.

        Args: cost_s: seconds that it was waited for in vain.
        """
        swarm, service_id = self._swarm, hop.server.service_id
        self._last_loss = hop, error
        self._progress[flow.index].lost += 1
        failures = self._failures[flow.index]
        refused = isinstance(error, RemoteError) and error.code in SENDERS_FAULT
        failures.note(service_id, refused)
        if refused and self._is_to_blame(hop, failures):
            for refuser in failures.refusers:
                swarm.bans.worked(refuser)
            self._error = error
            return
        if not swarm.bans.is_banned(service_id):
            swarm.note_loss(hop, error, self._owner)
        swarm.ban(service_id, error, cost_s)
        try:
            swarm.known.check_admission(hop.start, hop.stop, error, self._hosted_adapter)
        except NoRouteError as shut_out:
            self._error = shut_out
        for line in self._places[service_id].idle:
            line.close()
        self._places[service_id].idle.clear()

    def _is_to_blame(self, hop: Hop, failures: StepFailures) -> bool:
        """Whether a micro-batch is believed to be malformed, which servers have refused as such."""
        servers = self._swarm.known.servers(self._hosted_adapter)
        return failures.is_step_to_blame(hop.start, hop.stop, servers, self._worked)

    def _note(self, flow: Flow, hop: Hop) -> None:
        """A server did its part of a micro-batch; where that was the last one, tell so."""
        progress, clock = self._progress[flow.index], self._swarm.clock
        progress.route.append(str(hop))
        if flow.wanted is None:
            self._swarm.events.emit(
                MicroBatchFinished(
                    progress.direction,
                    flow.index,
                    *progress.blocks,
                    progress.tokens,
                    (clock.now() - progress.began_at) * 1e3,
                    tuple(progress.route),
                    progress.lost,
                    time=clock.time(),
                    owner=self._owner,
                )
            )

    # ------------------------------------------------------------------ no server is there

    async def _wait(self) -> None:
        """Wait until something happens, or the first micro-batch that waits for a server gives up."""
        until = min((stuck.give_up_at for stuck in self._stuck.values()), default=float("inf"))
        with anyio.move_on_after(until - self._swarm.clock.now()):
            await self._changed.wait()
            return
        await self._swarm.known.look_for_other_models()
        self._error = self._gave_up()

    async def _look(self) -> None:
        """Look up the servers anew, after a pause."""
        swarm = self._swarm
        try:
            await anyio.sleep(min(stuck.pause_s for stuck in self._stuck.values()))
            with anyio.move_on_after(swarm.settings.routing.route_timeout_s):
                await swarm.known.refresh()
        except SwarmkitError as error:
            logger.warning("could not look up the swarm, will try again: %s", error)
        for stuck in self._stuck.values():
            stuck.pause_s = min(2 * stuck.pause_s, _LONGEST_PAUSE_S)
            stuck.looked = True
        self._looking = False
        self._changed.set()

    def _gave_up(self) -> Exception:
        swarm = self._swarm
        seconds = swarm.settings.routing.route_timeout_s
        wanted = [flow.wanted for flow in self._flows if flow.index in self._stuck and flow.wanted]
        start, stop = min(wanted)
        error = swarm.known.no_route(start, stop)
        if not isinstance(error, NoRouteError) or error.missing or self._last_loss is None:
            return error
        hop, cause = self._last_loss
        return NoRouteError(
            f"the only servers of blocks {hop.start}:{hop.stop} kept failing for {seconds:.0f} s ({cause}); "
            "start another server for them, or try again later",
            [(hop.start, hop.stop)],
        )
