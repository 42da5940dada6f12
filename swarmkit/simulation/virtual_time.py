"""An event loop on which time passes only while everything waits, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from swarmkit.errors import SwarmkitError

T = TypeVar("T")

EPOCH = 1_800_000_000.0
"""Unix time at which virtual time begins."""


class StalledError(SwarmkitError):
    """Nothing is ready and no timer is set: the program would wait for ever."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """asyncio's loop, whose time jumps to the next timer when nothing is ready."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self._now += seconds


class _Jump(selectors.SelectSelector):
    """Waits for no file for longer than an instant: the loop's time passes instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StalledError("nothing is ready and no timer is set")
        if timeout > 0:
            self._loop.jump(timeout)
            return []
        return super().select(0)


class VirtualClock:
    """The loop's time as a `Clock`."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self.now = loop.time
        self.time = lambda: EPOCH + loop.time()


def run_virtually(main: Callable[[VirtualClock], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in virtual time; it ends the tasks that it starts."""
    loop = VirtualTimeLoop()
    try:
        return loop.run_until_complete(main(VirtualClock(loop)))
    finally:
        loop.close()
