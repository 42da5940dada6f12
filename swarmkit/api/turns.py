"""How many requests run at a time, and how many wait for their turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarmkit.api.refusals import ApiError

_RETRY_AFTER_S = 2.0


class Turns:
    """Lets some requests run, some more wait in the order in which they came, and refuses all others."""

    def __init__(self, running: int, waiting: int) -> None:
        """Begin with nothing under way.

        Args:
            running: how many may run at a time.
            waiting: how many more may wait.
        """
        self._most_running = running
        self._most_waiting = waiting
        self._places = asyncio.Semaphore(running)
        self.running = 0
        self.waiting = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place, and hold it.

        Raises:
            ApiError: too many requests wait already.
        """
        if self._places.locked() and self.waiting >= self._most_waiting:
            raise ApiError(
                429,
                f"{self.running} requests run and {self.waiting} wait, which is all that this server takes; "
                "try again later",
                code="rate_limit_exceeded",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()
