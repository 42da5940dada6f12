"""What tests of whole peers in virtual time need beside the loop of `swarmkit.simulation.virtual_time`.

Nothing waits: an hour of timers takes as long as what they start. In virtual time all code runs on the loop's
thread, so that the same program does the same things in the same order, however busy the machine is.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, TypeVar

import anyio.lowlevel
import anyio.to_thread
import pytest

from swarmkit.clock import Clock
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.net.registry.envelope import Envelope
from swarmkit.net.transport.identity import Identity
from swarmkit.server import head_start as head_start_module
from swarmkit.server import model_server as server_module
from swarmkit.server import vitals as vitals_module
from swarmkit.server.engine import engine as engine_module
from swarmkit.server.engine.engine import Engine
from swarmkit.simulation.virtual_time import VirtualClock, VirtualTimeLoop

T = TypeVar("T")


class VirtualWorker:
    """A `Worker` whose turns run on the loop in an instant, and whose outcomes arrive when they would have.

    What runs in a turn says with `spend` how long it takes.
    """

    running: VirtualWorker | None = None
    """Whose turn is running."""

    def __init__(self, name: str, clock: Clock) -> None:
        self._loop = asyncio.get_running_loop()
        self._spent_s = 0.0
        self._free_at = 0.0
        self._next: asyncio.TimerHandle | None = None
        self._stopped = False

    def now(self) -> float:
        return self._loop.time() + self._spent_s

    def spend(self, seconds: float) -> None:
        """The turn that runs takes so much longer."""
        self._spent_s += seconds

    def start(self, turn: Callable[[], float | None], end: Callable[[], None]) -> None:
        self._turn, self._end = turn, end

    def ring(self) -> None:
        self._schedule(max(self._loop.time(), self._free_at))

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()
        if not self._stopped:
            self._stopped = True
            self._end()

    def join(self) -> None:
        pass

    def deliver(self, loop: asyncio.AbstractEventLoop, act: Callable[..., object], *args: object) -> None:
        loop.call_at(self.now(), act, *args)

    def _schedule(self, at: float) -> None:
        if self._stopped or (self._next is not None and self._next.when() <= at):
            return
        if self._next is not None:
            self._next.cancel()
        self._next = self._loop.call_at(at, self._run)

    def _run(self) -> None:
        self._next = None
        VirtualWorker.running = self
        try:
            pause_s = self._turn()
        finally:
            VirtualWorker.running = None
            self._free_at, self._spent_s = self.now(), 0.0
        if pause_s is not None:
            self._schedule(self._free_at + pause_s)


class SharedStages:
    """Loads each run of blocks once; servers get copies that share its weights and take virtual time."""

    def __init__(self, checkpoint: Checkpoint, seconds: Callable[[int], float]) -> None:
        """Args: seconds: that a forward pass over so many rows x tokens takes."""
        self._checkpoint = checkpoint
        self._seconds = seconds
        self._load = Stage.load
        self._loaded: dict[tuple[int, int], Stage] = {}

    async def decode_rate(self, stage: Stage, engine: Engine) -> float:
        """As `measure_decode_rate`, of what would always be measured here."""
        return 1 / self._seconds(1)

    async def forward_rate(self, stage: Stage, engine: Engine) -> float:
        """As `measure_forward_rate`."""
        return 64 / self._seconds(64)

    def load(self, checkpoint: Checkpoint, start: int, stop: int, **options: Any) -> Stage:
        """As `Stage.load`."""
        if checkpoint is not self._checkpoint:
            return self._load(checkpoint, start, stop, **options)
        if (start, stop) not in self._loaded:
            options = {key: value for key, value in options.items() if key not in ("progress", "on_tensor")}
            self._loaded[start, stop] = self._load(checkpoint, start, stop, **options)
        shared = self._loaded[start, stop]
        stage = object.__new__(Stage)
        stage.__dict__.update(shared.__dict__)

        def forward_many(parts: Any) -> Any:
            worker = VirtualWorker.running
            assert worker is not None, "a forward pass outside of an engine's turn"
            worker.spend(self._seconds(sum(part.hidden.shape[0] * part.hidden.shape[1] for part in parts)))
            return shared.forward_many(parts)

        stage.forward_many = forward_many  # type: ignore[method-assign]
        return stage


def run(main: Callable[[VirtualClock], Coroutine[Any, Any, T]], stages: SharedStages, seed: int = 0) -> T:
    """Run a coroutine in virtual time, with identities and secrets from a seed, and without threads."""
    chance = random.Random(seed)
    loop = VirtualTimeLoop()
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=lambda: loop) as runner:
        patch.setattr(engine_module, "ThreadWorker", VirtualWorker)
        patch.setattr(anyio.to_thread, "run_sync", _run_here)
        patch.setattr(Stage, "load", stages.load)
        # Pure functions of many peers, all of which read the same records of the same model.
        patch.setattr(Envelope, "read", cache(Envelope.read))
        for module in (server_module, head_start_module):
            patch.setattr(module, "ensure_servable", lambda config: None)
        patch.setattr(vitals_module, "measure_decode_rate", stages.decode_rate)
        patch.setattr(vitals_module, "measure_forward_rate", stages.forward_rate)
        patch.setattr(secrets, "token_hex", lambda size=32: chance.randbytes(size).hex())
        patch.setattr(Identity, "__init__", _seeded(Identity.__init__, chance))
        return runner.run(main(VirtualClock(loop)))


async def _run_here(act: Callable[..., T], *args: object, **options: object) -> T:
    """In the place of `anyio.to_thread.run_sync`."""
    await anyio.lowlevel.checkpoint()
    return act(*args)


def _seeded(init: Callable[..., None], chance: random.Random) -> Callable[..., None]:
    def seeded(self: Identity, seed: bytes | None = None) -> None:
        init(self, seed or chance.randbytes(32))

    return seeded
