"""The blocks of a server, loaded while its node still joins the swarm."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import anyio.to_thread

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import ModelError
from swarmkit.models.check import ensure_servable
from swarmkit.models.execution.stage import Stage
from swarmkit.placement.intentions import Span
from swarmkit.server.config import ServerConfig
from swarmkit.server.engine.compiling import will_compile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedStage:
    """A stage, and the seconds that loading it took."""

    stage: Stage
    load_s: float


def load_stage(
    config: ServerConfig,
    blocks: Span,
    progress: Callable[[int, int], None] | None = None,
    on_tensor: Callable[[], None] | None = None,
) -> Stage:
    """Load blocks as a server's settings want them; see `Stage.load`."""
    low, high = blocks
    engine = config.settings.engine
    stage = Stage.load(
        config.checkpoint,
        low,
        high,
        dtype=config.dtype,
        device=config.device,
        progress=progress,
        on_tensor=on_tensor,
        will_compile=will_compile(engine),
    )
    if engine.cuda_graph_slots and stage.device.type == "cuda":
        stage.enable_cuda_graphs(engine.cuda_graph_slots, engine.cuda_graph_tokens)
    return stage


class HeadStart:
    """Loads the blocks that one server is told to serve, if their weights are on this machine.

    What fails here is not told: the server loads the blocks in its own time then, and tells of what fails
    again.
    """

    def __init__(self, config: ServerConfig, clock: Clock = SYSTEM_CLOCK) -> None:
        self._config = config
        self._clock = clock
        self._blocks = config.blocks
        self._begun = False
        self._ended = anyio.Event()
        self._given_up = threading.Event()
        self._loaded: LoadedStage | None = None

    async def run(self) -> None:
        """Load, until that is done or `give_up`."""
        if self._blocks is None or self._given_up.is_set():
            return
        self._begun = True
        try:
            loaded = await anyio.to_thread.run_sync(self._load, self._blocks)
            if not self._given_up.is_set():
                self._loaded = loaded
        except Exception as error:  # noqa: BLE001 - the server meets it again, where it can be told
            logger.info("blocks were not loaded while the swarm was joined: %s", error)
        finally:
            self._ended.set()

    def give_up(self) -> None:
        """End before the next tensor is read, and let go what was not taken."""
        self._given_up.set()
        self._loaded = None

    async def take(self, blocks: Span) -> LoadedStage | None:
        """The stage, once; None if these blocks were not loaded."""
        if not self._begun or blocks != self._blocks:
            return None
        await self._ended.wait()
        loaded, self._loaded = self._loaded, None
        return loaded

    def _load(self, blocks: Span) -> LoadedStage | None:
        config = self._config
        ensure_servable(config.checkpoint.config)
        config.precision.ensure_available(config.checkpoint.name, config.device)
        if not config.checkpoint.has_blocks(*blocks):
            return None  # they come from peers, too
        began_at = self._clock.now()
        stage = load_stage(config, blocks, on_tensor=self._check)
        return LoadedStage(stage, self._clock.now() - began_at)

    def _check(self) -> None:
        if self._given_up.is_set():
            raise ModelError("loading was ended, because its server is")


@asynccontextmanager
async def running(head_starts: Sequence[HeadStart]) -> AsyncIterator[None]:
    """Run them within the block; at its end they are given up and have ended."""
    async with anyio.create_task_group() as tasks:
        for head_start in head_starts:
            tasks.start_soon(head_start.run)
        try:
            yield
        finally:
            for head_start in head_starts:
                head_start.give_up()
