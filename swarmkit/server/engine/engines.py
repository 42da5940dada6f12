"""The engines of one process: one for each device, shared by everything that computes there."""

from __future__ import annotations

import anyio
import anyio.to_thread

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.server.engine.engine import Engine
from swarmkit.settings import EngineSettings


class Engines:
    """Makes an engine when a device is first asked for; an async context manager, which closes all."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._engines: dict[str, Engine] = {}

    def of(self, device: str, settings: EngineSettings) -> Engine:
        """The engine of a device, such as `"cpu"`. Settings count when it is made."""
        engine = self._engines.get(device)
        if engine is None:
            engine = self._engines[device] = Engine(
                device,
                prefill_chunk_tokens=settings.prefill_chunk_tokens,
                decode_slowdown=settings.decode_slowdown,
                clock=self._clock,
            )
        return engine

    @property
    def waiting(self) -> int:
        """Steps and jobs of all devices that have not begun."""
        return sum(engine.waiting for engine in self._engines.values())

    async def __aenter__(self) -> Engines:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            for engine in self._engines.values():
                await anyio.to_thread.run_sync(engine.close)
