"""The state of a swarm for many who look at once: it is looked up once every few seconds."""

from __future__ import annotations

import asyncio
import math
from functools import partial

from swarmkit.client.status import ModelStatus, look_up_status
from swarmkit.client.swarm.connection import Connection
from swarmkit.clock import SYSTEM_CLOCK, Clock


class FreshStatus:
    """The models of a client's swarm and their servers, as they were a few seconds ago at the most."""

    def __init__(self, connection: Connection, fresh_s: float = 2.0, clock: Clock = SYSTEM_CLOCK) -> None:
        self._connection = connection
        self._fresh_s = fresh_s
        self._clock = clock
        self._looking = asyncio.Lock()
        self._seen: list[ModelStatus] = []
        self._seen_at = -math.inf

    async def get(self) -> list[ModelStatus]:
        """Look, unless somebody has looked just now.

        Raises:
            TransportError: the shared table cannot be read.
        """
        async with self._looking:
            if self._clock.now() - self._seen_at > self._fresh_s:
                client = self._connection.client
                look = partial(self._connection.call, look_up_status, client.transport, client.clock)
                self._seen = await asyncio.get_running_loop().run_in_executor(None, look)
                self._seen_at = self._clock.now()
        return self._seen
