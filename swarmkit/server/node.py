"""A server's life: choose blocks, load, announce, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Literal

import anyio
import anyio.to_thread
import torch
from anyio.abc import TaskStatus

from swarmkit._version import __version__
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import NoContactError, TransportError, UsageError
from swarmkit.events import (
    AdapterHosted,
    BlocksLoaded,
    DrainStarted,
    EventStream,
    LoadProgressed,
    Owner,
    ServerJoined,
    ServerLeft,
    ServingStarted,
    Stamp,
)
from swarmkit.models.check import ensure_servable
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.plan import cache_cost, device_memory_bytes, format_bytes, plan_checkpoint
from swarmkit.models.quantization.precision import Precision
from swarmkit.net.connect import TransportFactory
from swarmkit.net.protocol.adapter_messages import ADAPTER
from swarmkit.net.protocol.gradient_messages import GRADIENT
from swarmkit.net.protocol.messages import MAX_ADDRESSES, PUSH, SESSION, Link, printable
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.registry.records import (
    MAX_HOSTED_ADAPTERS,
    Announcement,
    HostedAdapter,
    ServerState,
)
from swarmkit.net.registry.registry import Registry
from swarmkit.net.rpc.endpoints import listen
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.rates import PacedTransport, Rates
from swarmkit.net.transport.seam import Stream, Transport, endpoint_of
from swarmkit.server.adapters.service import AdapterService, load_hosted
from swarmkit.server.engine.engine import BULK, Engine
from swarmkit.server.engine.throughput import measure_decode_rate
from swarmkit.server.engine.trim_malloc import trim_malloc
from swarmkit.server.placement import Served, choose_blocks
from swarmkit.server.sessions.push import Links
from swarmkit.server.sessions.service import BlockService
from swarmkit.server.training.service import GradientService
from swarmkit.server.weights.service import WeightsSettings
from swarmkit.server.weights.share import SharedWeights
from swarmkit.settings import Limits, ServerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """What one server shall do."""

    checkpoint: Checkpoint
    blocks: tuple[int, int] | None = None
    """Serve exactly these; None = choose where the swarm needs them most."""
    num_blocks: int | Literal["auto"] | None = None
    """How many to choose; "auto" = as many as fit into memory; None = all of the model."""
    memory_bytes: int | None = None
    """Memory to plan with for "auto"; what the device has free if not given."""
    device: str = "cpu"
    dtype: str | torch.dtype = "auto"
    public_name: str = ""
    adapters: tuple[str, ...] = ()
    """Folders or Hub repositories of LoRA adapters to host."""
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    settings: ServerSettings = field(default_factory=ServerSettings)

    def __post_init__(self) -> None:
        total = self.checkpoint.num_blocks
        if self.blocks is not None and not 0 <= self.blocks[0] < self.blocks[1] <= total:
            low, high = self.blocks
            raise UsageError(f"blocks {low}:{high} are not inside this model's 0:{total}")
        if len(self.adapters) > MAX_HOSTED_ADAPTERS:
            raise UsageError(f"a server hosts up to {MAX_HOSTED_ADAPTERS} adapters, not {len(self.adapters)}")
        if isinstance(self.num_blocks, int) and not 1 <= self.num_blocks <= total:
            raise UsageError(
                f"this model has {total} blocks; a server can hold 1 to {total}, not {self.num_blocks}"
            )


class ServerNode:
    """One server, as a task: `run` owns everything that it starts."""

    def __init__(
        self,
        config: ServerConfig,
        transport_factory: TransportFactory,
        identity: Identity,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._config = config
        self._factory = transport_factory
        self._identity = identity
        self._clock = clock
        self._owner = Owner("server", identity.peer_id)
        self.events = EventStream(apart={LoadProgressed: 1})
        self._stop = anyio.Event()
        self._life: anyio.CancelScope | None = None
        self._drain_timeout = config.settings.node.drain_timeout_s
        self._state: ServerState = "joining"
        self._rate = 0.0
        self._sequence = 0
        self.limits = config.settings.limits
        self._rates = Rates(clock.now)
        self._engine: Engine | None = None
        self._expires_at = 0.0
        self.blocks: tuple[int, int] = config.blocks or (0, 0)
        self.service: BlockService | None = None
        self.gradients: GradientService | None = None
        self.transport: Transport | None = None

    def set_limits(self, limits: Limits) -> None:
        """Keep within other limits from the next step on; see `BlockService.set_limits`."""
        self.limits = limits
        self._rates.replace(limits.upload_bytes_per_s, limits.download_bytes_per_s)
        if self._engine is not None:
            self._engine.set_threads(limits.threads)
        if self.service is not None:
            self.service.set_limits(limits)
        if self.gradients is not None:
            self.gradients.kept.set_capacity(limits.activation_cache_bytes)

    def request_stop(self, drain_timeout: float | None = None) -> None:
        """Leave: finish what runs, let sessions move away for `drain_timeout` seconds, then end."""
        if drain_timeout is not None:
            self._drain_timeout = drain_timeout
        self._stop.set()

    def skip_drain(self) -> None:
        """While leaving: wait for sessions no longer."""
        if self.service is not None:
            self.service.stop_waiting()

    def crash(self) -> None:
        """End as a crash would: nothing is announced, streams just end."""
        if self._life is not None:
            self._life.cancel()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until `request_stop` or `crash`, or until cancelled."""
        with anyio.CancelScope() as self._life:
            await self._run(task_status)
        self.events.emit(ServerLeft(**self._now()))
        self.events.close()

    async def _run(self, task_status: TaskStatus[None]) -> None:
        config = self._config
        async with AsyncExitStack() as owned:
            await anyio.to_thread.run_sync(ensure_servable, config.checkpoint.config)
            precision = Precision.parse(config.dtype, config.checkpoint.config, config.device)
            available = precision.ensure_available  # which may import much
            await anyio.to_thread.run_sync(available, config.checkpoint.name, config.device)
            fingerprint = await anyio.to_thread.run_sync(lambda: config.checkpoint.fingerprint)
            unpaced = await self._factory(self._identity, acceptable_now)
            owned.push_async_callback(_shielded, unpaced.close)
            self.set_limits(self.limits)
            transport = PacedTransport(unpaced, self._rates)
            self.transport = transport
            registry = Registry(transport, self._clock.time)
            self.events.emit(ServerJoined(tuple(transport.addresses), **self._now()))

            self.blocks = await self._choose(registry, fingerprint)
            await self._announce(registry, fingerprint)
            weights = SharedWeights(transport, config.checkpoint, config.weights)
            await self._fetch(weights)
            stage = await self._load()
            engine = Engine(
                config.device,
                prefill_chunk_tokens=config.settings.engine.prefill_chunk_tokens,
                decode_slowdown=config.settings.engine.decode_slowdown,
                clock=self._clock,
            )
            self._engine = engine
            engine.set_threads(self.limits.threads)
            weights.service.busy = lambda: engine.waiting > 0  # their copy waits while somebody's token does
            owned.push_async_callback(_shielded, lambda: anyio.to_thread.run_sync(engine.close))
            self._rate = (await engine.run(lambda: measure_decode_rate(stage, self._clock.now), BULK)).value
            await engine.run(trim_malloc, BULK)
            cost = cache_cost(config.checkpoint, stage.dtype)
            self.service = service = BlockService(
                stage,
                fingerprint,
                cost.token_bytes,
                engine,
                config.settings,
                self._links(transport),
            )
            service.budget.row_tokens = cost.row_tokens
            await self._host(service, stage)
            adapters = AdapterService(
                stage, fingerprint, engine, config.settings, service.intake, service.adapters
            )
            await listen(transport, ADAPTER, adapters.serve)
            await listen(transport, PUSH, service.serve_pushes)
            await listen(transport, SESSION, service.serve)
            self.gradients = GradientService(
                stage,
                fingerprint,
                engine,
                config.settings,
                service.intake,
                lambda: service.leaving,
                service.adapters,
            )
            self.set_limits(self.limits)  # they may have been replaced meanwhile
            await listen(transport, GRADIENT, self.gradients.serve)
            low, high = self.blocks
            await owned.enter_async_context(weights.sharing(low, high))
            self._state = "online"
            await self._announce(registry, fingerprint)
            self.events.emit(
                ServingStarted(
                    low,
                    high,
                    self._rate,
                    config.checkpoint.name,
                    fingerprint,
                    tuple(transport.addresses),
                    **self._now(),
                )
            )
            task_status.started()

            await self._announce_until_stopped(registry, fingerprint)
            await self._leave(registry, fingerprint, service)

    def _links(self, transport: Transport) -> Links | None:
        """The ways to servers with the next blocks, if outputs may go straight there."""
        settings = self._config.settings
        if not settings.sessions.push:
            return None

        async def dial(link: Link) -> Stream:
            name = endpoint_of(PUSH.endpoint, link.service)
            return await transport.open(link.peer_id, name, link.addresses, settings.sessions.link_timeout_s)

        return Links(dial, settings.sessions.link_timeout_s, settings.requests.message_timeout_s)

    async def _choose(self, registry: Registry, fingerprint: str) -> tuple[int, int]:
        config = self._config
        view = await registry.look_up(fingerprint, config.checkpoint.num_blocks)
        others = view.servers(self._clock.time(), ("joining", "online"))
        # Until it has measured itself, a newcomer counts as a typical server, so that several that start
        # together do not all fill the same hole.
        self._rate = statistics.median([o.throughput for o in others]) if others else 1.0
        if config.blocks is not None:
            return config.blocks
        total = config.checkpoint.num_blocks
        served = [Served(o.start, o.stop, max(o.throughput, 1e-6)) for o in others]
        if config.num_blocks == "auto":
            count = await anyio.to_thread.run_sync(self._count)
        else:
            count = config.num_blocks or total
        return choose_blocks(total, count, served)

    def _count(self) -> int:
        """As many blocks as fit into memory beside the cache and the workspace."""
        config = self._config
        precision = Precision.parse(config.dtype, config.checkpoint.config, config.device)
        memory = device_memory_bytes(config.device) if config.memory_bytes is None else config.memory_bytes
        fitting = plan_checkpoint(
            config.checkpoint,
            memory,
            precision,
            cache_tokens=config.settings.node.cache_tokens,
            max_step_tokens=config.settings.requests.max_step_tokens,
            cuda_graph_slots=config.settings.engine.cuda_graph_slots,
            cuda_graph_tokens=config.settings.engine.cuda_graph_tokens,
            training_bytes=config.settings.limits.activation_cache_bytes,
            device=config.device,
        )
        if not fitting.blocks_that_fit:
            needed = fitting.workspace_bytes + fitting.block_bytes + fitting.kv_bytes_per_block
            raise UsageError(
                f"not one block of {config.checkpoint.name} in {precision.name} fits: it needs "
                f"{format_bytes(needed)}, there are {format_bytes(memory)}; "
                "choose a lower precision or less cache"
            )
        return fitting.blocks_that_fit

    async def _fetch(self, weights: SharedWeights) -> None:
        """Have the blocks' weights here, from peers or the Hub; a local folder has them already."""
        low, high = self.blocks
        await weights.fetch(low, high, self._progress("fetching"))

    def _progress(self, action: Literal["fetching", "loading"]) -> Callable[[int, int], None]:
        """Returns what a thread that fetches or loads calls with how much of all it has."""
        low, high = self.blocks
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            event = LoadProgressed(low, high, action, done / max(total, 1), **self._now())
            loop.call_soon_threadsafe(self.events.emit, event)

        return progress

    def _now(self) -> Stamp:
        return {"time": self._clock.time(), "owner": self._owner}

    async def _load(self) -> Stage:
        low, high = self.blocks
        config = self._config
        progress = self._progress("loading")
        progress(0, 1)
        stage = await anyio.to_thread.run_sync(
            lambda: Stage.load(
                config.checkpoint, low, high, dtype=config.dtype, device=config.device, progress=progress
            )
        )
        if config.settings.engine.cuda_graph_slots and stage.device.type == "cuda":
            stage.enable_cuda_graphs(
                config.settings.engine.cuda_graph_slots, config.settings.engine.cuda_graph_tokens
            )
        self.events.emit(BlocksLoaded(low, high, **self._now()))
        return stage

    async def _host(self, service: BlockService, stage: Stage) -> None:
        """Load the adapters that this server has for everybody."""
        for path in self._config.adapters:
            name, label, adapter = await anyio.to_thread.run_sync(
                load_hosted, path, self._config.checkpoint.config, stage
            )
            service.adapters.host(name, label, adapter)
            self.events.emit(AdapterHosted(label, name, **self._now()))

    async def _announce(self, registry: Registry, fingerprint: str) -> None:
        config, transport, service = self._config, self.transport, self.service
        assert transport is not None
        precision = Precision.parse(config.dtype, config.checkpoint.config, config.device)
        now = self._clock.time()  # which may have been set back: later words must win all the same
        self._sequence = max(int(now * 1e9), self._sequence + 1)
        self._expires_at = max(now + config.settings.node.record_lifetime_s, self._expires_at + 1e-3)
        announcement = Announcement(
            peer_id=transport.peer_id,
            fingerprint=fingerprint,
            model=printable(config.checkpoint.name)[-256:],
            num_blocks=config.checkpoint.num_blocks,
            start=self.blocks[0],
            stop=self.blocks[1],
            state=self._state,
            throughput=self._rate,
            free_cache_tokens=service.free_cache_tokens if service else 0,
            dtype=precision.name,
            addresses=tuple(transport.addresses)[:MAX_ADDRESSES],
            public_name=printable(config.public_name)[:64],
            software=f"swarmkit {__version__}",
            adapters=_hosted(service),
            sequence=self._sequence,
            expires_at=self._expires_at,
        )
        if await registry.announce(announcement) == 0:
            logger.warning("no peer accepted our announcement; will try again")

    async def _announce_until_stopped(self, registry: Registry, fingerprint: str) -> None:
        """Announce again and again; gives up when nobody can know of this server any more.

        Raises:
            TransportError: for so long that the last announcement has expired.
        """
        settings = self._config.settings
        succeeded_at = self._clock.now()
        while not self._stop.is_set():
            with anyio.move_on_after(settings.node.announce_period_s):
                await self._stop.wait()
                return
            if self.gradients is not None:
                self.gradients.kept.drop_old()
            try:
                await self._announce(registry, fingerprint)
                succeeded_at = self._clock.now()
            except TransportError as error:
                too_long = self._clock.now() - succeeded_at > settings.node.record_lifetime_s
                # A transport without contact looks for it by itself, and the next announcement tries again.
                if too_long and not isinstance(error, NoContactError):
                    raise
                logger.warning("could not announce this server, will try again: %s", error)

    async def _leave(self, registry: Registry, fingerprint: str, service: BlockService) -> None:
        self._state = "leaving"
        service.leaving = True
        self.events.emit(DrainStarted(service.num_sessions, **self._now()))
        try:
            await self._announce(registry, fingerprint)
        except TransportError as error:
            logger.warning("could not announce that this server leaves: %s", error)
        if not await service.drain(self._drain_timeout):
            logger.warning("%d sessions had not moved away in time", service.num_sessions)


def _hosted(service: BlockService | None) -> tuple[HostedAdapter, ...]:
    hosted = service.adapters.hosted.items() if service else ()
    return tuple(HostedAdapter(printable(label)[-96:], name) for name, label in hosted)


async def _shielded(close: Callable[[], object]) -> None:
    """Run a closing coroutine to its end even when its owner is being cancelled."""
    with anyio.CancelScope(shield=True):
        await close()  # type: ignore[misc]
