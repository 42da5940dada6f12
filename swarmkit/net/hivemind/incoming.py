"""Streams that other peers open: let in one after the other, and served each in a task of its own."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import anyio

from swarmkit.clock import Clock
from swarmkit.net.hivemind import way
from swarmkit.net.hivemind.control import announced_opener
from swarmkit.net.hivemind.direct import DirectListener
from swarmkit.net.hivemind.entrance import Entrance, StreamGate
from swarmkit.net.hivemind.framing import FrameStream
from swarmkit.net.hivemind.table import end_tasks
from swarmkit.net.transport.rates import TokenBucket
from swarmkit.net.transport.seam import Handler
from swarmkit.net.transport.shares import Holder
from swarmkit.net.transport.swarm_key import SwarmKey, admit_opener

logger = logging.getLogger(__name__)

MOST_UNDECIDED = 1024
"""Streams that are not served yet, as their openers have not chosen how to go on."""
_OPENED_PER_S, _OPENED_AT_ONCE = 50.0, 200.0
"""How fast streams are let in: to begin one takes a millisecond or two of the event loop's time."""
_GREETING_TIMEOUT_S = 10.0


class IncomingStreams:
    """Knows who serves the streams of each name, and the tasks that do."""

    def __init__(self, own_id: str, key: SwarmKey | None, clock: Clock) -> None:
        """Serve nothing yet.

        Args: key: of the private swarm, without which no peer opens a stream here.
        """
        self._own_id = own_id
        self._key = key
        self.handlers: dict[str, Handler] = {}
        """What serves the streams of each name."""
        self.direct: DirectListener | None = None
        """Where peers may go on directly; None = nowhere."""
        self._undecided = Entrance(MOST_UNDECIDED)
        self._gate = StreamGate(TokenBucket(_OPENED_PER_S, _OPENED_AT_ONCE, clock.now))
        self._serving: dict[str, set[asyncio.Task[Any]]] = {}

    async def serve(self, stream: FrameStream, name: str | None = None) -> None:
        """Serve a stream to its end, in the task of the caller.

        Args: name: of the stream, where it is this peer's own; else the daemon tells it.
        """
        try:
            if name is None:
                with anyio.fail_after(_GREETING_TIMEOUT_S):
                    name = await announced_opener(stream)
            handler = self.handlers[name]
            task = asyncio.current_task()
            assert task is not None
            of_name = self._serving.setdefault(name, set())
            of_name.add(task)
            task.add_done_callback(of_name.discard)
            holder = Holder(stream.host, stream.peer_id)
            with self._undecided.holds(stream, holder):
                await self._gate.turn(stream, holder)
                if self._key is not None:
                    with anyio.fail_after(_GREETING_TIMEOUT_S):
                        await admit_opener(self._key, stream, name, self._own_id)
                stream = await way.accept(stream, self.direct, _GREETING_TIMEOUT_S)
            await handler(stream)
        except Exception:
            logger.debug("a stream called %r from peer %s ended", name, stream.peer_id, exc_info=True)
        finally:
            stream.close()

    async def end(self, name: str) -> None:
        """End the streams of a name that are served."""
        await end_tasks(self._serving.pop(name, set()))
