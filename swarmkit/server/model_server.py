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
from swarmkit.errors import TransportError, UsageError, unwrapped
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
from swarmkit.models.plan import cache_cost
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.listed_transport import ListedTransport
from swarmkit.net.rpc.receive_budget import ReceiveBudget
from swarmkit.net.transport.paced import PacedTransport
from swarmkit.net.transport.peer_lists import PeerLists
from swarmkit.net.transport.rates import Rates, StreamTraffic
from swarmkit.net.transport.seam import Transport
from swarmkit.placement.description import Served
from swarmkit.placement.petals import choose_blocks
from swarmkit.server.adapters.service import load_hosted
from swarmkit.server.announcer import Announcer
from swarmkit.server.cache.kv_budget import KVBudget
from swarmkit.server.config import ServerConfig
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.throughput import measure_decode_rate
from swarmkit.server.engine.trim_malloc import trim_malloc
from swarmkit.server.engine.work import BULK, EngineClosedError
from swarmkit.server.quota import ClientQuota
from swarmkit.server.serving import Serving
from swarmkit.server.sessions.links import Links, NextServers
from swarmkit.server.weights.service import WeightsService
from swarmkit.server.weights.share import SharedWeights
from swarmkit.settings import Limits

logger = logging.getLogger(__name__)

_TAKE_BACK_S = 2.0


class _Run:
    """One run of blocks, from loading to the end of its last session, and what other peers are told about
    it.
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.told_to_leave = anyio.Event()
        self.ended = anyio.Event()
        """Set when `run` ends, however it does."""
        self.drain_timeout = 0.0

    def leave(self, drain_timeout: float) -> None:
        """End once all sessions have moved away, at the latest after `drain_timeout` seconds."""
        self.drain_timeout = drain_timeout
        self.told_to_leave.set()

    async def end_within(self, drain_timeout: float) -> None:
        """Wait for the end of a run that drains already, but for `drain_timeout` seconds at most."""
        with anyio.move_on_after(drain_timeout):
            await self.ended.wait()
        self.serving.skip_drain()


class ModelServer:
    """Serves blocks of one model to a swarm; a part of a `Node`. Everything here runs on the event loop."""

    def __init__(self, config: ServerConfig, peer_id: str, clock: Clock = SYSTEM_CLOCK) -> None:
        """Args: peer_id: of the peer that will run it."""
        self.config = config
        self.events = EventStream(apart={LoadProgressed: 1})
        self.rate = 0.0
        """Decode steps (tokens) per second through all blocks, as measured, or as expected until then."""
        self.limits = config.settings.limits
        """What it keeps within; see `set_limits`."""
        self._clock = clock
        access = config.settings.access
        self._lists = PeerLists(access.allowed_peers, access.blocked_peers)
        self._rates = Rates(clock.now)
        self._quota = ClientQuota(clock.now)
        self._engine: Engine | None = None
        self._owner = Owner("server", peer_id)
        self.ended = anyio.Event()
        """Set when `run` ends, however it does."""
        self._stop = anyio.Event()
        self._drain_timeout = config.settings.node.drain_timeout_s
        self._life: anyio.CancelScope | None = None
        self._loading: anyio.CancelScope | None = None
        self._moving = anyio.Lock()
        self._tasks: TaskGroup | None = None
        self._current: _Run | None = None
        self._runs: list[_Run] = []
        """All that serve: the current one, and those that drain."""

    # ------------------------------------------------------------------ what others see and ask for

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks [a, b) that new sessions find here; (0, 0) before they are chosen."""
        return self._current.serving.blocks if self._current else self.config.blocks or (0, 0)

    @property
    def serving(self) -> Serving | None:
        """The run of blocks that new sessions find here; None before the first one serves."""
        return self._current.serving if self._current else None

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
        self.limits = limits
        self._rates.replace(limits.upload_bytes_per_s, limits.download_bytes_per_s)
        self._quota.per_minute = limits.client_tokens_per_minute
        if self._engine is not None:
            self._engine.set_pace(limits.threads, limits.compute_share)
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
        for serving in self.servings:
            serving.skip_drain()

    def crash(self) -> None:
        """End as a crash would: nothing is announced, streams just end."""
        if self._life is not None:
            self._life.cancel()

    async def move(self, blocks: tuple[int, int]) -> None:
        """Serve other blocks [a, b) from now on; returns when clients can use them.

        Where memory allows, the new blocks are loaded while the old ones serve, and the old ones drain when
        the new ones are announced. Else the old ones drain first. Should the new ones fail to load, the old
        ones are served again.

        Raises:
            UsageError: the blocks are outside the model, or the server does not serve.
            ModelError: the new blocks cannot be had.
        """
        self.config.check_blocks(blocks)
        async with self._moving:
            old = self._current
            if old is None or self._stop.is_set():
                raise UsageError("this server does not serve (any more), so that it cannot move")
            if blocks == old.serving.blocks:
                return
            if await anyio.to_thread.run_sync(self.config.fits_beside, old.serving.blocks, blocks):
                self._current = await self._begin(blocks)
                old.leave(self.config.settings.node.drain_timeout_s)
            else:
                del old  # so that its stage can go
                await self._replace(blocks)

    async def _replace(self, blocks: tuple[int, int]) -> None:
        """Move where there is no room for both the old and the new blocks."""
        assert self._current is not None
        held, ended = self._current.serving.blocks, self._current.ended
        self._current.leave(self.config.settings.node.drain_timeout_s)
        await ended.wait()
        self._current = None
        try:
            self._current = await self._begin(blocks)
        except Exception:
            if not self._stop.is_set():
                self._current = await self._begin(held)
            raise

    async def _begin(self, blocks: tuple[int, int]) -> _Run:
        """Start to serve blocks in a task of their own; returns when clients can use them.

        Raises:
            UsageError: the server was told to stop meanwhile.
        """
        assert self._tasks is not None
        run: _Run | None = None
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
                        self._current = await self._tasks.start(self._serve, blocks)
                    self._loading = None
                    task_status.started()
                    await self._stop.wait()
                    for run in self._runs:
                        if run.told_to_leave.is_set():
                            self._tasks.start_soon(run.end_within, self._drain_timeout)
                        else:
                            run.leave(self._drain_timeout)
            self.events.emit(ServerLeft(**self._now()))
            self.events.close()
        finally:
            self.ended.set()

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
        self.set_limits(self.limits)

    async def _choose(self, registry: Registry) -> tuple[int, int]:
        """The blocks to begin with."""
        config = self.config
        others = await self._others(registry)
        if config.blocks is not None:
            return config.blocks
        total = config.checkpoint.num_blocks
        served = [Served(o.start, o.stop, max(o.throughput, 1e-6)) for o in others]
        if config.num_blocks == "auto":
            count = await anyio.to_thread.run_sync(config.blocks_that_fit)
        else:
            count = config.num_blocks or total
        return choose_blocks(total, count, served)

    async def _others(self, registry: Registry) -> list[Announcement]:
        """The servers of the model that are here, or are about to be.

        Until this one has measured itself it counts as a typical one of them, so that several that start
        together do not all fill the same hole.
        """
        view = await registry.look_up(self._fingerprint, self.config.checkpoint.num_blocks)
        others = view.servers(self._clock.time(), ("joining", "online"))
        self.rate = statistics.median([o.throughput for o in others]) if others else 1.0
        return others

    # ------------------------------------------------------------------ one run of blocks

    async def _serve(
        self, blocks: tuple[int, int], *, task_status: TaskStatus[_Run] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Load blocks and serve them until told to leave, and until all sessions have left."""
        config, engine = self.config, self._engine
        assert engine is not None
        with self._registry.numbered() as number:
            announcer = Announcer(self._registry, config, self._fingerprint, blocks, number, self._clock)
            await announcer.announce(state="joining", throughput=self.rate)
            try:
                stage = await self._load(blocks)
                rate = await self._measure(stage, engine)
            except BaseException:
                await self._take_back(announcer)
                raise
            run = _Run(
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
                )
            )
            del stage
            self._runs.append(run)
            run.serving.set_limits(self.limits)
            ended = run.ended
            try:
                async with run.serving:
                    await self._announce(run, announcer, rate, task_status)
            finally:
                self._runs.remove(run)
                del run  # and with it the stage
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
        return Links(lambda: self._transport, find, *times, self._clock.now)

    async def _take_back(self, announcer: Announcer) -> None:
        """Tell the swarm that blocks which were announced will not come, but for a crash."""
        if self._life is None or self._life.cancel_called:
            return
        with anyio.move_on_after(_TAKE_BACK_S, shield=True), contextlib.suppress(TransportError):
            await announcer.announce(state="leaving")

    async def _announce(
        self, run: _Run, announcer: Announcer, rate: float, task_status: TaskStatus[_Run]
    ) -> None:
        """Tell the swarm of a run of blocks while it is served, and when it ends."""
        serving, (low, high) = run.serving, run.serving.blocks
        await announcer.announce(
            state="online",
            throughput=rate,
            free_cache_tokens=serving.sessions.free_cache_tokens,
            adapters=serving.hosted,
        )
        self.rate = rate
        name, addresses = self.config.checkpoint.name, tuple(self._transport.addresses)
        self._emit(ServingStarted, low, high, rate, name, self._fingerprint, addresses)
        task_status.started(run)

        def news() -> dict[str, object]:
            serving.gradients.kept.drop_old()
            return {"free_cache_tokens": serving.sessions.free_cache_tokens}

        await announcer.announce_until(run.told_to_leave, news)
        serving.sessions.leaving = True
        self._emit(DrainStarted, low, high, serving.sessions.num_sessions)
        try:
            await announcer.announce(state="leaving", **news())
        except TransportError as error:
            logger.warning("could not announce that blocks %d:%d are no longer served: %s", low, high, error)
        if not await serving.drain(run.drain_timeout):
            left = serving.sessions.num_sessions
            logger.warning("%d sessions of blocks %d:%d had not moved away in time", left, low, high)

    async def _load(self, blocks: tuple[int, int]) -> Stage:
        """Have the blocks' weights here, from peers or the Hub, and then in the device's memory."""
        (low, high), config = blocks, self.config
        await self._weights.fetch(low, high, self._progress(low, high, "fetching"))
        progress = self._progress(low, high, "loading")
        progress(0, 1)
        stage = await anyio.to_thread.run_sync(
            lambda: Stage.load(
                config.checkpoint, low, high, dtype=config.dtype, device=config.device, progress=progress
            )
        )
        settings = config.settings.engine
        if settings.cuda_graph_slots and stage.device.type == "cuda":
            stage.enable_cuda_graphs(settings.cuda_graph_slots, settings.cuda_graph_tokens)
        self._emit(BlocksLoaded, low, high)
        return stage

    async def _measure(self, stage: Stage, engine: Engine) -> float:
        """Decode steps per second through all blocks of a stage, measured unless the settings name them."""
        rate = self.config.settings.node.throughput
        if rate is None:
            rate = await measure_decode_rate(stage, engine)
        await engine.run(trim_malloc, BULK)
        return rate

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
