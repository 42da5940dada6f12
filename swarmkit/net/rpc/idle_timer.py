"""Closes a stream on which something was waited for in vain."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Protocol

from swarmkit.errors import PeerTimeoutError, PeerUnreachableError

_LOOK_EVERY_S = 10.0


class Closable(Protocol):
    """What an idle timer closes: a stream to a peer."""

    @property
    def peer_id(self) -> str: ...

    def close(self) -> None: ...


class IdleTimer:
    """A deadline for what is awaited on one stream. When it passes, the stream is closed and the wait ends.

    A cancel scope around every receive and send would do the same. This is one timer that looks now and then:
    a step costs it two assignments, and there are many steps. The time is the event loop's.

    As a context manager it is a deadline around several sends and receives; see `within`.
    """

    def __init__(self, stream: Closable) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._until = math.inf
        self._seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.expired = False
        """Whether the stream was closed because a deadline passed."""

    def start(self, seconds: float) -> None:
        """Set the deadline to so many seconds from now, whatever it was before."""
        now = self._loop.time()
        self._seconds = seconds
        self._until = now + seconds
        if self._timer is not None and self._timer.when() > self._until:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._arm(now)

    def stop(self) -> None:
        """Have no deadline until the next `start`."""
        self._until = math.inf

    def close(self) -> None:
        """Let go of the stream. May be called twice."""
        self._until = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def within(self, seconds: float) -> IdleTimer:
        """`with timer.within(seconds):` — a deadline for all that is awaited on the stream in the block.

        The block raises PeerTimeoutError when the deadline has passed.
        """
        self.start(seconds)
        return self

    def __enter__(self) -> IdleTimer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._until = math.inf
        if self.expired and isinstance(error, PeerUnreachableError):
            peer_id = self._stream.peer_id
            raise PeerTimeoutError(f"the peer was silent for {self._seconds:.1f} s", peer_id) from None

    def _arm(self, now: float) -> None:
        self._timer = self._loop.call_at(min(self._until, now + _LOOK_EVERY_S), self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        if now >= self._until:
            self.expired = True
            self._stream.close()
        elif self._until != math.inf:
            self._arm(now)
