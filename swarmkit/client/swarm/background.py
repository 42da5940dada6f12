"""Work beside the answers of a client: nothing that a user waits for ever waits for it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import anyio

logger = logging.getLogger(__name__)

Work = Callable[[], Awaitable[None]]


class Background:
    """Does one piece of work after the other; what comes while `most` wait is not done at all."""

    def __init__(self, most: int = 1) -> None:
        self._waiting: deque[Work] = deque()
        self._most = most
        self._is_there = anyio.Event()
        self.done = 0
        """Pieces that were done."""

    @property
    def has_room(self) -> bool:
        """Whether `offer` takes a piece of work now."""
        return len(self._waiting) < self._most

    def offer(self, work: Work) -> None:
        """Have a piece of work done later, if there is room. Is quick; call on the event loop's thread."""
        if self.has_room:
            self._waiting.append(work)
            self._is_there.set()

    async def run(self) -> None:
        """Do what was offered, until cancelled. What a piece raises is logged."""
        while True:
            await self._is_there.wait()
            self._is_there = anyio.Event()
            while self._waiting:
                try:
                    await self._waiting.popleft()()
                except Exception as error:
                    logger.warning("work beside the answers failed: %s", error, exc_info=error)
                self.done += 1
