"""The life of a server of one model: choose blocks, serve them until told to stop or move, drain, go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
from collections.abc import Callable
from typing import Literal

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup, TaskStatus

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import NoContactError, TransportError, UsageError, unwrapped
from swarmkit.events import (
    AdapterHosted,
    BlocksLoaded,
    DrainStarted,
    Event,
    EventStream,
    LoadProgressed,
    Owner,
    ServerJoined,
    ServerLeft,
    ServingStarted,
    Stamp,
)
from swarmkit.models.adapters.adapter import Adapter
from swarmkit.models.check import ensure_servable
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.output_layer import OutputLayer
from swarmkit.models.plan import cache_cost
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.listed_transport import ListedTransport
from swarmkit.net.rpc.receive_budget import ReceiveBudget
from swarmkit.net.rpc.server_info import is_there
from swarmkit.net.transport.paced import PacedTransport
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.net.transport.rates import Rates, StreamTraffic
from swarmkit.net.transport.seam import Transport
from swarmkit.placement.intentions import Span
from swarmkit.server.adapters.service import load_hosted
from swarmkit.server.announcer import Announcer
from swarmkit.server.block_run import BlockRun
from swarmkit.server.cache.kv_budget import KVBudget
from swarmkit.server.config import ServerConfig
from swarmkit.server.engine.compiling import StepCompiler
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.trim_malloc import trim_malloc
from swarmkit.server.engine.work import BULK, EngineClosedError
from swarmkit.server.head.service import HeadService
from swarmkit.server.head_start import HeadStart, load_stage
from swarmkit.server.moving import BlockMoves
from swarmkit.server.quota import ClientQuota
from swarmkit.server.relocation import Relocation, as_expected, first_place, in_reach
from swarmkit.server.serving import Serving
from swarmkit.server.sessions.link_times import LinkTimes
from swarmkit.server.sessions.links import Links, NextServers
from swarmkit.server.vitals import Vitals
from swarmkit.server.weights.service import WeightsService
from swarmkit.server.weights.share import SharedWeights
from swarmkit.settings import Limits

logger = logging.getLogger(__name__)

_CONTACT_PATIENCE_S = 30.0
_CONTACT_PAUSE_S = 0.5
_TAKE_BACK_S = 2.0
_SIGN_OF_LIFE_S = 5.0
_LEAST_PATIENCE_S = 1.0
"""Between two looks at whether others have the blocks that sessions still use."""


class ModelServer:
    """Serves blocks of one model to a swarm; a part of a `Node`. Everything here runs on the event loop."""

    def __init__(self, config: ServerConfig, peer_id: str, clock: Clock = SYSTEM_CLOCK) -> None:
        """Args: peer_id: of the peer that will run it."""
        self.config = config
        self.events = EventStream(apart={LoadProgressed: 1})
        self.rate = 0.0
        """Decode steps (tokens) per second through all blocks, as measured, or as expected until then."""
        self.load_s = 0.0
        """How long it took to fetch and load blocks the last time."""
        self.limits = config.settings.limits
        """What it keeps within; see `set_limits`."""
        self.head_start = HeadStart(config, clock)
        """Loads blocks that are certain, beside whatever goes before `run`, if its owner runs it."""
        self._clock = clock
        access = config.settings.access
        self._lists = PeerLists(access.allowed_peers, access.blocked_peers)
        self._rates = Rates(clock.now)
        self._quota = ClientQuota(clock.now)
        self._engine: Engine | None = None
        self._cache: KVBudget | None = None
        self._head: HeadService | None = None
        self._most_cache_bytes: int | None = None
        """Where the number of blocks follows the memory: what they leave for sessions."""
        self._owner = Owner("server", peer_id)
        self.ended = anyio.Event()
        """Set when `run` ends, however it does."""
        self._stop = anyio.Event()
        self._drain_timeout = config.settings.node.drain_timeout_s
        self._life: anyio.CancelScope | None = None
        self._loading: anyio.CancelScope | None = None
        self._tasks: TaskGroup | None = None
        self._moves = BlockMoves(
            config,
            peer_id,
            begin=self._begin,
            elsewhere=self._elsewhere,
            is_stopping=self._stop.is_set,
            emit=self._emit,
        )
        self._runs: list[BlockRun] = []
        """All that serve: the current one, and those that drain."""

    # ------------------------------------------------------------------ what others see and ask for

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks [a, b) that new sessions find here; (0, 0) before they are chosen."""
        return self._moves.current.serving.blocks if self._moves.current else self.config.blocks or (0, 0)

    @property
    def serving(self) -> Serving | None:
        """The run of blocks that new sessions find here; None before the first one serves."""
        return self._moves.current.serving if self._moves.current else None

    @property
    def servings(self) -> list[Serving]:
        """All runs of blocks that have sessions: the current one and those that drain."""
        return [run.serving for run in self._runs]

    @property
    def traffic(self) -> StreamTraffic:
        """What its streams have sent and received."""
        return self._rates.traffic

    def set_limits(self, limits: Limits) -> None:
        """Keep within other limits from the next step on; see `BlockService.set_limits`."""
        if self._most_cache_bytes is not None and limits.cache_bytes > self._most_cache_bytes:
            limits = limits.replace(cache_bytes=self._most_cache_bytes)
        if limits.threads != self.limits.threads:
            for run in self._runs:
                run.pace_changed()
        self.limits = limits
        self._rates.replace(limits.upload_bytes_per_s, limits.download_bytes_per_s)
        self._quota.per_minute = limits.client_tokens_per_minute
        if self._engine is not None:
            self._engine.set_pace(limits.threads, limits.compute_share)
        if self._cache is not None:
            self._cache.set_capacity(limits.cache_bytes)
        for serving in self.servings:
            serving.set_limits(limits)

    def request_stop(self, drain_timeout: float | None = None) -> None:
        """Leave: finish what runs, let sessions move away for `drain_timeout` seconds, then end."""
        if drain_timeout is not None:
            self._drain_timeout = drain_timeout
        self._stop.set()
        if self._loading is not None:
            self._loading.cancel()

    def skip_drain(self) -> None:
        """While leaving: wait for sessions no longer."""
        for run in self._runs:
            run.skip_drain()

    def crash(self) -> None:
        """End as a crash would: nothing is announced, streams just end."""
        if self._life is not None:
            self._life.cancel()

    async def move(
        self, blocks: tuple[int, int], why: str = "its owner wants it", *, if_not_needed: bool = False
    ) -> None:
        """Serve other blocks [a, b) from now on; returns when clients can use them.

        Where memory allows, the new blocks are loaded while the old ones serve, and the old ones drain when
        the new ones are announced. Else the old ones drain first. Should the new ones fail to load, the old
        ones are served again.

        Sessions of the old blocks are told to move with their next step, and replay at the server that they
        move to. Where nobody else has the old blocks, they are served until the last session has ended.

        Args:
            why: for people.
            if_not_needed: stay if nobody else would have some of the old blocks when all that mean to move
                have done so (`swarmkit/placement/intentions.py`).

        Raises:
            UsageError: the blocks are outside the model, the server does not serve, or it is needed here.
            ModelError: the new blocks cannot be had.
        """
        await self._moves.move(blocks, why, if_not_needed=if_not_needed)

    async def intend(self, blocks: Span | None) -> None:
        """Tell the swarm where this server means to go, or that it means to stay.

        Raises:
            TransportError: nobody could be told of the intention.
        """
        await self._moves.intend(blocks)

    async def _begin(self, blocks: tuple[int, int]) -> BlockRun:
        """Start to serve blocks in a task of their own; returns when clients can use them.

        Raises:
            UsageError: the server was told to stop meanwhile.
        """
        assert self._tasks is not None
        run: BlockRun | None = None
        with anyio.CancelScope() as self._loading:
            run = await self._tasks.start(self._serve, blocks)
        self._loading = None
        if run is None:
            raise UsageError("this server was told to stop while it loaded other blocks")
        return run

    # ------------------------------------------------------------------ life

    async def run(
        self,
        *,
        transport: Transport,
        registry: Registry,
        engine: Engine,
        weights: WeightsService,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `request_stop` or `crash`, or until cancelled.

        Args:
            transport, registry: this peer's.
            engine: of the device that is to compute.
            weights: hands out the files of blocks to other servers.
        """
        try:
            with anyio.CancelScope() as self._life, transport.deal_with(self._lists), unwrapped():
                self.events.emit(ServerJoined(tuple(transport.addresses), **self._now()))
                await self._prepare(transport, registry, engine, weights)
                blocks = await self._choose(registry)
                async with anyio.create_task_group() as self._tasks:
                    with anyio.CancelScope() as self._loading:
                        self._moves.current = await self._tasks.start(self._serve, blocks)
                    self._loading = None
                    task_status.started()
                    await self._until_stopped(registry)
                    for run in self._runs:
                        if run.told_to_leave.is_set():
                            self._tasks.start_soon(run.end_within, self._drain_timeout)
                        else:
                            run.leave(self._drain_timeout)
            self.events.emit(ServerLeft(**self._now()))
            self.events.close()
        finally:
            self.head_start.give_up()
            self._head = None
            self.ended.set()

    async def _until_stopped(self, registry: Registry) -> None:
        """Wait until told to stop, and meanwhile move where it is needed more, if its owner lets it."""
        settings, total = self.config.settings.moving, self.config.checkpoint.num_blocks
        async with anyio.create_task_group() as beside:
            if settings.moves and self.config.blocks is None:
                relocation = Relocation(
                    self, registry, self._fingerprint, total, settings, self._clock, self._is_there
                )
                beside.start_soon(relocation.run)
            await self._stop.wait()
            beside.cancel_scope.cancel()

    async def _is_there(self, server: Announcement) -> bool:
        assert self._transport is not None
        return await is_there(self._transport, server, _SIGN_OF_LIFE_S)

    async def _prepare(
        self, transport: Transport, registry: Registry, engine: Engine, weights: WeightsService
    ) -> None:
        config = self.config
        await anyio.to_thread.run_sync(ensure_servable, config.checkpoint.config)
        precision = config.precision
        available = precision.ensure_available  # which may import much
        await anyio.to_thread.run_sync(available, config.checkpoint.name, config.device)
        self._fingerprint = await anyio.to_thread.run_sync(lambda: config.checkpoint.fingerprint)
        self._transport = PacedTransport(ListedTransport(transport, self._lists), self._rates)
        self._registry, self._engine = registry, engine
        self._weights = SharedWeights(
            self._transport,
            config.checkpoint,
            config.weights,
            service=weights,
            clock=lambda: self._clock.time(),
        )
        cost = await anyio.to_thread.run_sync(cache_cost, config.checkpoint, precision.dtype)
        self._cache = KVBudget(self.limits.cache_bytes, cost.row_tokens)
        self._receive_budget = ReceiveBudget(config.settings.requests.receive_budget_bytes)
        self.ways = LinkTimes(self._clock.now)
        """Round trips to the servers that outputs are handed on to."""
        self.set_limits(self.limits)
        self._head = await self._load_head(engine)

    async def _load_head(self, engine: Engine) -> HeadService | None:
        """The output layer for clients, if its owner offers it; all runs of blocks share it."""
        config = self.config
        if not config.settings.head.offer_head:
            return None
        layer = await anyio.to_thread.run_sync(OutputLayer.load, config.checkpoint, config.device)
        head = HeadService(
            layer,
            self._fingerprint,
            engine,
            config.settings,
            self._receive_budget,
            self._stop.is_set,
            self._quota,
        )
        await head.measure()
        return head

    async def _choose(self, registry: Registry) -> tuple[int, int]:
        """The blocks to begin with."""
        config = self.config
        others = await self._others(registry)
        if config.blocks is not None:
            return config.blocks
        total = config.checkpoint.num_blocks
        if config.num_blocks == "auto":
            fitting = await anyio.to_thread.run_sync(config.fitting)
            count = fitting.count
            self._most_cache_bytes = fitting.cache_bytes
            self.set_limits(self.limits)
        else:
            count = config.num_blocks or total
        expected = as_expected(registry.peer_id, others)
        return first_place(total, count, self.rate, expected)

    async def _others(self, registry: Registry) -> list[Announcement]:
        """The servers of the model that are here, or are about to be.

        Until this one has measured itself it counts as a typical one of them, so that several that start
        together do not all fill the same hole.
        """
        patience = self._clock.now() + _CONTACT_PATIENCE_S
        while True:
            try:
                view = await registry.look_up(self._fingerprint, self.config.checkpoint.num_blocks)
                break
            except NoContactError as error:
                if self._clock.now() > patience:
                    raise
                logger.warning("%s", error)  # the transport joins the swarm again by itself
                await anyio.sleep(_CONTACT_PAUSE_S)
        others = in_reach(view, self._clock.time())
        usual = statistics.median([o.throughput for o in others]) if others else 1.0
        self.rate = self.config.settings.node.throughput or usual
        return others

    # ------------------------------------------------------------------ one run of blocks

    async def _serve(
        self, blocks: tuple[int, int], *, task_status: TaskStatus[BlockRun] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Load blocks and serve them until told to leave, and until all sessions have left."""
        config, engine = self.config, self._engine
        assert engine is not None
        with self._registry.numbered() as number:
            announcer = Announcer(self._registry, config, self._fingerprint, blocks, number, self._clock)
            await announcer.announce(state="joining", throughput=self.rate)
            try:
                stage = await self._load(blocks)
            except BaseException:
                await self._take_back(announcer)
                raise
            assert self._cache is not None
            run = BlockRun(
                Serving(
                    stage,
                    service=number,
                    checkpoint=config.checkpoint,
                    fingerprint=self._fingerprint,
                    hosted=await self._adapters_for(stage),
                    transport=self._transport,
                    engine=engine,
                    cache=self._cache,
                    receive_budget=self._receive_budget,
                    quota=self._quota,
                    weights=self._weights,
                    links=self._links(),
                    settings=config.settings,
                    head=self._head,
                ),
                announcer,
            )
            del stage
            self._runs.append(run)
            run.serving.set_limits(self.limits)
            ended = run.ended
            vitals = Vitals(
                run.serving,
                self._fingerprint,
                config.settings.node,
                self.ways,
                self._clock,
                compute_share=lambda: self.limits.compute_share,
            )
            run.pace_changed = vitals.pace_changed
            try:
                async with run.serving:
                    await self._get_ready(vitals, announcer)
                    await self._announce(run, announcer, vitals, task_status)
            finally:
                self._runs.remove(run)
                del run, vitals  # and with them the stage
                with anyio.CancelScope(shield=True), contextlib.suppress(EngineClosedError):
                    await engine.run(trim_malloc, BULK)
                ended.set()

    def _links(self) -> Links | None:
        """The ways to servers with the next blocks, if outputs may go straight there."""
        settings = self.config.settings
        if not settings.sessions.push:
            return None
        find = NextServers(self._registry, self._fingerprint, self._clock).find
        times = settings.sessions.link_timeout_s, settings.requests.message_timeout_s
        return Links(lambda: self._transport, find, *times, self._clock.now, self.ways)

    async def _get_ready(self, vitals: Vitals, announcer: Announcer) -> None:
        """Measure a run of blocks, and see that it answers, before clients are told of it.

        Raises:
            ProbeError: it does not answer a token.
        """
        assert self._engine is not None
        try:
            await vitals.measure()
            await self._engine.run(trim_malloc, BULK)
            await vitals.probe()
        except BaseException:
            await self._take_back(announcer)
            raise

    async def _take_back(self, announcer: Announcer) -> None:
        """Tell the swarm that blocks which were announced will not come, but for a crash."""
        if self._life is None or self._life.cancel_called:
            return
        with anyio.move_on_after(_TAKE_BACK_S, shield=True), contextlib.suppress(TransportError):
            await announcer.announce(state="leaving")

    async def _announce(
        self, run: BlockRun, announcer: Announcer, vitals: Vitals, task_status: TaskStatus[BlockRun]
    ) -> None:
        """Tell the swarm of a run of blocks while it is served, and when it ends."""
        serving, (low, high) = run.serving, run.serving.blocks

        def news() -> dict[str, object]:
            serving.gradients.kept.drop_old()
            found = vitals.news()
            self.rate = found["throughput"]
            head_ms = 0.0 if serving.head is None else serving.head.row_ms
            free, kv_bytes = serving.sessions.free_cache_tokens, serving.handover.kv_bytes
            return {**found, "free_cache_tokens": free, "head_ms": head_ms, "kv_bytes": kv_bytes}

        await announcer.announce(**news(), adapters=serving.hosted)
        name, addresses = self.config.checkpoint.name, tuple(self._transport.addresses)
        self._emit(ServingStarted, low, high, self.rate, name, self._fingerprint, addresses)
        task_status.started(run)
        async with anyio.create_task_group() as beside:
            beside.start_soon(vitals.watch)
            engine = self.config.settings.engine
            if engine.compile != "off" and serving.stage.device.type == "cpu":
                compiler = StepCompiler(serving.stage, serving.engine, engine, self._emit)
                beside.start_soon(compiler.run)
            await announcer.announce_until(run.told_to_leave, news)
            beside.cancel_scope.cancel()
        serving.sessions.leaving = True
        self._emit(DrainStarted, low, high, serving.sessions.num_sessions)
        try:
            await announcer.announce(**{**news(), "state": "leaving"})
        except TransportError as error:
            logger.warning("could not announce that blocks %d:%d are no longer served: %s", low, high, error)
        if not await self._drain(run):
            left = serving.sessions.num_sessions
            logger.warning("%d sessions of blocks %d:%d had not moved away in time", left, low, high)

    async def _drain(self, run: BlockRun) -> bool:
        """Let sessions move away; returns whether all have."""
        while not await run.serving.drain(run.drain_timeout):
            if not (run.is_patient and await self._moves.is_needed(run.serving.blocks)):
                return False
            run.drain_timeout = max(run.drain_timeout, _LEAST_PATIENCE_S)
        return True

    async def _elsewhere(self) -> list[Announcement]:
        """The servers of other peers that are here, or are about to be.

        Raises:
            TransportError: the shared table cannot be read.
        """
        view = await self._registry.look_up(self._fingerprint, self.config.checkpoint.num_blocks)
        here = self._registry.peer_id
        return [one for one in in_reach(view, self._clock.time()) if one.peer_id != here]

    async def _load(self, blocks: tuple[int, int]) -> Stage:
        """Have the blocks' weights here, from peers or the Hub, and then in the device's memory."""
        (low, high), config = blocks, self.config
        began_at = self._clock.now()
        await self._weights.fetch(low, high, self._progress(low, high, "fetching"))
        fetch_s = self._clock.now() - began_at
        progress = self._progress(low, high, "loading")
        progress(0, 1)
        loaded = await self.head_start.take(blocks)
        if loaded is not None:
            progress(1, 1)
            self.load_s = fetch_s + loaded.load_s
            stage = loaded.stage
        else:
            stage = await anyio.to_thread.run_sync(load_stage, config, blocks, progress)
            self.load_s = self._clock.now() - began_at
        self._emit(BlocksLoaded, low, high)
        return stage

    async def _adapters_for(self, stage: Stage) -> list[tuple[str, str, Adapter]]:
        """The parts of the hosted adapters for a stage's blocks, with hash and label."""
        found = []
        for path in self.config.adapters:
            hosted = await anyio.to_thread.run_sync(load_hosted, path, self.config.checkpoint.config, stage)
            digest, label, _ = hosted
            found.append(hosted)
            self._emit(AdapterHosted, label, digest)
        return found

    # ------------------------------------------------------------------ events

    def _progress(
        self, low: int, high: int, action: Literal["fetching", "loading"]
    ) -> Callable[[int, int], None]:
        """Returns what a thread that fetches or loads calls with how much of all it has."""
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            event = LoadProgressed(low, high, action, done / max(total, 1), **self._now())
            loop.call_soon_threadsafe(self.events.emit, event)

        return progress

    def _emit(self, kind: type[Event], *values: object) -> None:
        self.events.emit(kind(*values, **self._now()))  # type: ignore[misc]

    def _now(self) -> Stamp:
        return {"time": self._clock.time(), "owner": self._owner}
