"""Ends a conversation in which nothing has happened for too long."""

from __future__ import annotations

import asyncio
import math

from swarmkit.net.rpc.conversation import Conversation

_LOOK_EVERY_S = 10.0


class IdleTimer:
    """How long one conversation may stay silent; when that is over, it is closed, and whoever waits wakes up.

    A cancel scope around every receive and send would do the same. This is one timer that looks now and then:
    a step costs it two assignments, and there are many steps.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._loop = asyncio.get_running_loop()
        self._until = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self.expired = False

    def start(self, seconds: float) -> None:
        """Be patient for so long from now, whatever was said before."""
        now = self._loop.time()
        self._until = now + seconds
        if self._timer is not None and self._timer.when() > self._until:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._arm(now)

    def stop(self) -> None:
        """Nobody waits any more."""
        self._until = math.inf

    def close(self) -> None:
        """Forget about the conversation. May be called twice."""
        self._until = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, now: float) -> None:
        self._timer = self._loop.call_at(min(self._until, now + _LOOK_EVERY_S), self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        if now >= self._until:
            self.expired = True
            self._conversation.close()
        elif self._until != math.inf:
            self._arm(now)
