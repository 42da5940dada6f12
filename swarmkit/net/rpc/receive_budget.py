"""Memory for large messages: all peers together may not fill this machine with them.

::

    capacity >= bytes of large payloads that are arriving, waiting for the engine, or in it

A message that comes when there is no room waits for its turn, in order. Small ones, such as the steps of
single tokens, need no turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from types import TracebackType

import anyio

from swarmkit.net.rpc.message_stream import CHUNK_BYTES


class ReceiveBudget:
    """A number of bytes that messages share while they are handled. Used by the event loop's thread only."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.held_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, nbytes: int) -> None:
        """Wait until there is room for `nbytes`, and hold it. What is larger than all of it has it alone."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, turn))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):
                    self._waiting.remove((nbytes, turn))
                self._let_in()  # those behind it may fit
            else:
                self.give_back(nbytes)
            raise

    def give_back(self, nbytes: int) -> None:
        """End the hold of `nbytes`."""
        self.held_bytes -= nbytes
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            nbytes, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if self.held_bytes and self.held_bytes + nbytes > self.capacity_bytes:
                return
            self._waiting.popleft()
            self.held_bytes += nbytes
            turn.set_result(None)


class ReceiveReservation:
    """What one message holds of the budget, from its header until it is done with; `with` gives it back."""

    def __init__(self, budget: ReceiveBudget) -> None:
        self._budget = budget
        self._nbytes = 0

    async def take(self, nbytes: int, seconds: float) -> None:
        """Wait for room for so many bytes; a small message needs none.

        Raises:
            TimeoutError: there was none for so many seconds.
        """
        if nbytes <= CHUNK_BYTES:
            return
        with anyio.fail_after(seconds):
            await self._budget.take(nbytes)
        self._nbytes += nbytes

    def __enter__(self) -> ReceiveReservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._budget.give_back(self._nbytes)
        self._nbytes = 0
