"""The servers of a session in order: how they are found, linked, left and replaced by others."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise

import anyio
import torch

from swarmkit.client.adapters.model_adapters import ClientAdapter, ServerAdapter
from swarmkit.client.routing.route import Hop
from swarmkit.client.routing.step_failures import StepFailures
from swarmkit.client.session.familiar_route import familiar_route
from swarmkit.client.session.handover import handed_over
from swarmkit.client.session.history import NoHistory
from swarmkit.client.session.replica import Predecessor, StageReplica
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.client.swarm.prefix_cache import Chain
from swarmkit.client.swarm.route_search import RouteSearch
from swarmkit.errors import (
    NoRouteError,
    PeerError,
    PeerTimeoutError,
    RemoteError,
    SessionError,
    SwarmkitError,
)
from swarmkit.events import Owner, PeerReplaced, Rerouted, RoutePlanned
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.messages import SENDERS_FAULT

logger = logging.getLogger(__name__)


@dataclass
class _Loss:
    """A server that was lost in a step, or left because it had no room."""

    hop: Hop
    at: float
    busy: bool = False
    handed_over: bool = False
    """Whether what it held was brought to the server that took its place."""


@dataclass
class RouteChanges:
    """What one step may do to the route, and what it did.

    Attributes:
        position: tokens per row that the session held before the step.
        size: rows x tokens that servers hold after it.
        hidden: what it brings, `[rows, tokens, hidden]`.
    """

    swarm: SwarmClient
    owner: Owner
    position: int
    size: int
    hosted_adapter: str
    hidden: torch.Tensor
    losses: list[_Loss] = field(default_factory=list)
    mixed: bool = False
    """Whether what was computed before is not all by the present servers, nor like what they compute."""
    _search: RouteSearch | None = None
    """Most steps need none."""
    _done_to: int = 0
    """The blocks before it have done their part."""

    @cached_property
    def failures(self) -> StepFailures:
        """The servers that failed in this step."""
        return StepFailures()

    async def find(
        self, start: int, stop: int, error: PeerError | None, again_s: float = math.inf
    ) -> list[Hop]:
        """See `RouteSearch.find`; its timeout is the step's, however many servers are searched for."""
        return await self._needed_search().find(start, stop, self.size, error, again_s)

    def lost_server(self) -> None:
        """A server that had let the session in was lost."""
        self._needed_search().lost_server()

    def progressed(self, stop: int) -> None:
        """The stage that ends at a block did its part: a search that begins after it has all the time again.

        What a session that begins anew has done once before is no progress.
        """
        if stop > self._done_to:
            self._done_to = stop
            if self._search is not None:
                self._search.progress()

    def _needed_search(self) -> RouteSearch:
        if self._search is None:
            begun = self.position > 0
            self._search = RouteSearch(
                self.swarm, self.owner, self.failures, self.hosted_adapter, has_begun=begun
            )
        return self._search


class SessionRoute:
    """The stages of a session; blocks [start, stop) of the model."""

    def __init__(
        self,
        swarm: SwarmClient,
        owner: Owner,
        start: int,
        stop: int,
        max_length: int,
    ) -> None:
        self._swarm = swarm
        self._owner = owner
        self.start = start
        self.stop = stop
        self.max_length = max_length
        self.stages: list[StageReplica] = []
        """Empty before the first step."""
        self.adapter: ClientAdapter | ServerAdapter | None = None
        """For the servers that are used from now on."""
        self.is_closed = False
        self._worked: set[str] = set()
        """Servers that did a step of this session and were left since, by service id."""

    @property
    def hops(self) -> list[Hop]:
        return [stage.hop for stage in self.stages]

    @property
    def chain(self) -> Chain:
        """The servers, as the memory of prefixes names them."""
        return tuple((hop.server.service_id, hop.start, hop.stop) for hop in self.hops)

    def drop(self) -> None:
        """End the streams to all servers."""
        for stage in self.stages:
            stage.drop()

    def close(self) -> None:
        """End the streams to all servers for good."""
        self.is_closed = True
        self.drop()

    def check_open(self) -> None:
        """Raise SessionError if the session was closed, perhaps while something was waited for."""
        if self.is_closed:
            raise SessionError("the session is closed; open a new one with model.session()")

    def give_up_step(self, index: int = 0) -> None:
        """Expect no more of the present step from the stages from `index` on."""
        for stage in self.stages[index:]:
            stage.give_up_step()

    # ------------------------------------------------------------------ before a step

    async def prepare(self, changes: RouteChanges) -> None:
        """Have a route, move away from servers that said they leave, and link the others.

        Raises:
            NoRouteError: no server of some blocks was found in time.
        """
        if not self.stages:
            hops = await changes.find(self.start, self.stop, None)
            if not changes.position and changes.hidden.shape[0] == 1 and self._swarm.prefix_cache:
                hops = await familiar_route(self._swarm, hops, changes.hidden[0], changes.hosted_adapter)
            self.stages = [self._replica(hop) for hop in hops]
            self._swarm.events.emit(
                RoutePlanned(tuple(map(str, hops)), time=self._swarm.clock.time(), owner=self._owner)
            )
        if self._swarm.bans.convicted:
            for stage in self.stages:
                stage.standing.is_doubted |= self._swarm.bans.is_convicted(stage.standing.keys_from)
        for stage in [stage for stage in self.stages if stage.leaving or stage.standing.is_doubted]:
            if stage.leaving:
                await self._leave(stage, changes)
            else:
                self._splice(self.stages.index(stage), [stage.hop])
                stage.drop()
        if self._swarm.bans.convicted:
            for stage in [stage for stage in self.stages if self._is_convicted(stage)]:
                if hops := self._others(stage, changes):
                    self._lose(stage, changes, "its outputs are wrong")
                    self._splice(self.stages.index(stage), hops)
        if self._swarm.settings.transfer.push and len(self.stages) > 1 and not self._is_linked():
            await self._link(changes)

    def _replica(self, hop: Hop) -> StageReplica:
        return StageReplica(self._swarm, hop, adapter=self.adapter)

    def _is_linked(self) -> bool:
        """Whether every server is linked to the next one, or cannot be."""
        return all(
            before.is_linked_to(following)
            or not self._swarm.routes.may_link(before.hop.server, following.hop.server)
            for before, following in pairwise(self.stages)
        )

    async def _link(self, changes: RouteChanges) -> None:
        """Open all sessions, and have each server push its outputs to the next one, as far as it can."""
        swarm = self._swarm
        asked_at = swarm.clock.now()
        while errors := await at_once(
            {stage: partial(stage.open, self.max_length) for stage in self.stages if stage.connection is None}
        ):
            stage, error = next(iter(errors.items()))
            for failed in errors:
                failed.drop()
            self.check_open()
            await self.replace(self.stages.index(stage), error, changes, swarm.clock.now() - asked_at)
            asked_at = swarm.clock.now()
        self.check_open()
        errors = await at_once(
            {
                before: partial(self._try_link, before, following)
                for before, following in pairwise(self.stages)
                if before.connection and following.connection and not before.is_linked_to(following)
            }
        )
        for stage in errors:
            stage.drop()  # the step finds the server lost when it needs it, and tells so

    async def _try_link(self, before: StageReplica, following: StageReplica) -> None:
        one, other = before.hop.server, following.hop.server
        if self._swarm.routes.may_link(one, other) and not await before.link(following):
            self._swarm.routes.cannot_link(one, other)
            logger.info("%s cannot reach %s: this client sends its outputs on", one.label, other.label)

    def _is_convicted(self, stage: StageReplica) -> bool:
        return self._swarm.bans.is_convicted(stage.hop.server.service_id)

    def _others(self, stage: StageReplica, changes: RouteChanges) -> list[Hop]:
        """Servers that can take a server's place at once; none if it must stay, while this looks around."""
        hop, swarm = stage.hop, self._swarm
        leaving = frozenset(other.hop.server.service_id for other in self.stages if other.leaving)
        try:
            hops = swarm.routes.plan(hop.start, hop.stop, leaving, changes.size, changes.hosted_adapter)
        except NoRouteError:
            hops = []
        if not hops or not all(map(swarm.routes.may_use, hops)):
            swarm.known.look_soon()
            return []
        return hops

    async def _leave(self, stage: StageReplica, changes: RouteChanges) -> None:
        """Move away from a server that leaves, if others hold its blocks; what it holds goes along, or is
        replayed.
        """
        hops = self._others(stage, changes)
        if not hops:
            return
        swarm, since = self._swarm, self._swarm.clock.now()
        new: StageReplica | None = None
        failure: PeerError | None = None
        if len(hops) == 1:
            held = changes.hidden.shape[0], changes.position, self.max_length
            try:
                new = await handed_over(swarm, stage, hops[0], self.adapter, *held, self._owner)
            except PeerError as error:
                failure = error
            if self.is_closed and new is not None:
                new.drop()
            self.check_open()
        if new is None and changes.position and not swarm.settings.sessions.recovery:
            return  # it can only go on where it is
        self._lose(stage, changes, "is leaving")
        changes.losses[-1].at = since
        index = self.stages.index(stage)
        if new is None:
            self._splice(index, hops)
            if failure is not None:
                await self.replace(index, failure, changes, swarm.clock.now() - since)
        else:
            changes.losses[-1].handed_over = changes.mixed = True
            self.stages[index] = new

    # ------------------------------------------------------------------ in the course of a step

    def stop_pushing_to(self, index: int) -> None:
        """Have nothing more pushed to a stage, which found what was pushed to it wrong."""
        before, stage = self.stages[index - 1], self.stages[index]
        self._swarm.routes.cannot_link(before.hop.server, stage.hop.server)
        before.unlink()

    async def replace(self, index: int, error: PeerError, changes: RouteChanges, cost_s: float) -> int:
        """Put other servers in the place of one that failed.

        Args: cost_s: seconds that it was waited for in vain.

        Returns: the stage that goes on: the first of the new ones, or 0 if the whole session begins anew.

        Raises:
            PeerError: `error`, if the session keeps no history, or if the step itself is to blame.
            NoRouteError: no other server was found in time, or all of them refuse this client altogether.
        """
        stage = self.stages[index]
        if not self._swarm.settings.sessions.recovery and changes.position:
            raise error
        if isinstance(error, RemoteError) and error.is_busy:
            return await self._avoid_busy(index, error, changes)
        refused = isinstance(error, RemoteError) and error.code in SENDERS_FAULT
        changes.failures.note(stage.hop.server.service_id, refused)
        if refused and self._is_step_to_blame(stage, changes):
            for service_id in changes.failures.refusers:
                self._swarm.bans.worked(service_id)
            raise error
        if isinstance(error, PeerTimeoutError) and index:
            # Perhaps the previous server never pushed what it said it pushed: it is not asked to again.
            self._swarm.routes.cannot_link(self.stages[index - 1].hop.server, stage.hop.server)
        self._swarm.ban(stage.hop.server.service_id, error, cost_s)
        self._lose(stage, changes, error)
        blocks = stage.hop.start, stage.hop.stop
        if changes.failures.count > 1:  # before the session is sent to one after the other
            await self._swarm.scout.find(*blocks, changes.hosted_adapter)
        self._swarm.known.check_admission(*blocks, error, changes.hosted_adapter)
        hops = await changes.find(*blocks, error)
        self._splice(index, hops)
        return index

    def _is_step_to_blame(self, stage: StageReplica, changes: RouteChanges) -> bool:
        history, position = stage.history, changes.position
        is_known = position < history.tokens and not isinstance(history, NoHistory)
        if is_known and not codec.is_finite(history.read(position, history.tokens)):
            return True
        worked = self._worked.union(each.hop.server.service_id for each in self.stages if each.has_worked)
        servers = self._swarm.known.servers(changes.hosted_adapter)
        return changes.failures.is_step_to_blame(stage.hop.start, stage.hop.stop, servers, worked)

    async def _avoid_busy(self, index: int, error: RemoteError, changes: RouteChanges) -> int:
        """Use others in the place of a busy server, or wait for it where it is the first to have room.

        Returns: as `replace`.
        """
        stage, hop, since = self.stages[index], self.stages[index].hop, self._swarm.clock.now()
        self._swarm.note_refusal(hop, error, self._owner)
        hops = await changes.find(hop.start, hop.stop, error, self._again_s(index, changes))
        self.check_open()
        if not hops:
            await self._begin_anew(hop, error, changes)
            return 0
        if [(other.server.service_id, other.stop) for other in hops] == [(hop.server.service_id, hop.stop)]:
            return index  # it may have kept what it holds of the session
        stage.drop()
        changes.losses.append(_Loss(hop, since, busy=True))
        self._splice(index, hops)
        return index

    def _again_s(self, index: int, changes: RouteChanges) -> float:
        """Seconds to compute once more what the stages before one hold of a session's first step; inf if they
        hold nothing, or what earlier steps brought.
        """
        holding = [stage for stage in self.stages[:index] if stage.held]
        if changes.position or not holding:
            return math.inf
        times = [self._swarm.routes.times_of(stage.hop.server).usual_s(changes.size) for stage in holding]
        return sum(math.inf if seconds is None else seconds for seconds in times)

    async def _begin_anew(self, busy: Hop, error: RemoteError, changes: RouteChanges) -> None:
        """Give back all that the session holds while it waits for room, and choose all servers once more.

        Sessions that hold caches while they wait for others keep these from those that need nothing else.
        """
        since = self._swarm.clock.now()
        self.drop()
        hops = await changes.find(self.start, self.stop, error)
        self.check_open()
        if busy.server.service_id not in [hop.server.service_id for hop in hops]:
            changes.losses.append(_Loss(Hop(busy.server, self.start, self.stop), since, busy=True))
        self.stages[:] = [self._replica(hop) for hop in hops]
        if self._swarm.settings.transfer.push and len(self.stages) > 1:
            await self._link(changes)

    def _lose(self, stage: StageReplica, changes: RouteChanges, cause: PeerError | str) -> None:
        hop = stage.hop
        if stage.connection is not None:
            changes.lost_server()
        stage.drop()
        if stage.has_worked:
            self._worked.add(hop.server.service_id)
        changes.losses.append(_Loss(hop, self._swarm.clock.now()))
        self._swarm.note_loss(hop, cause, self._owner)

    def _splice(self, index: int, hops: Sequence[Hop]) -> None:
        """Replace a stage by others; the first of them inherits its history.

        The stages behind hold what the old server computed: the last new one will be compared with it.
        """
        old, new = self.stages[index], [self._replica(hop) for hop in hops]
        new[0].history = old.history
        if old.history.tokens and self._swarm.settings.sessions.recovery:
            new[-1].predecessor = old.predecessor or Predecessor(old.hop, old.history)
        self.stages[index : index + 1] = new

    def tell_replacements(self, changes: RouteChanges) -> None:
        """The step is done: tell which servers do now what the lost ones did."""
        now = self._swarm.clock.now()
        for loss in changes.losses:
            lost = loss.hop
            covering = [hop for hop in self.hops if lost.start <= hop.start and hop.stop <= lost.stop]
            event = Rerouted if loss.busy else PeerReplaced
            self._swarm.events.emit(
                event(
                    lost.server.peer_id,
                    lost.server.label,
                    tuple(hop.server.peer_id for hop in covering),
                    tuple(str(hop) for hop in covering),
                    0 if loss.handed_over else changes.position,
                    (now - loss.at) * 1e3,
                    time=self._swarm.clock.time(),
                    owner=self._owner,
                )
            )


async def at_once(
    work: Mapping[StageReplica, Callable[[], Awaitable[object]]],
) -> dict[StageReplica, PeerError]:
    """Do something with several stages at the same time; returns the failures by stage.

    Raises:
        SwarmkitError: the first error that no peer is the cause of.
    """
    errors: dict[StageReplica, PeerError] = {}
    ours: list[SwarmkitError] = []

    async def one(stage: StageReplica, act: Callable[[], Awaitable[object]]) -> None:
        try:
            await act()
        except PeerError as error:
            errors[stage] = error
        except SwarmkitError as error:
            ours.append(error)

    async with anyio.create_task_group() as tasks:
        for stage, act in work.items():
            tasks.start_soon(one, stage, act)
    if ours:
        raise ours[0]
    return errors
