"""One run of blocks that a server serves, from loading to the end of its last session."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from swarmkit.placement.intentions import Span
from swarmkit.server.announcer import Announcer
from swarmkit.server.serving import Serving


class BlockRun:
    """One run of blocks, and what other peers are told about it."""

    def __init__(self, serving: Serving, announcer: Announcer) -> None:
        self.serving = serving
        self.announcer = announcer
        self.moving_to: Span | None = None
        """Where the server means to go, as others were told."""
        self.told_to_leave = anyio.Event()
        self.ended = anyio.Event()
        """Set when the run ends, however it does."""
        self.drain_timeout = 0.0
        self.is_patient = False
        self.pace_changed: Callable[[], None] = lambda: None

    def leave(self, drain_timeout: float, is_patient: bool = False) -> None:
        """End once all sessions have moved away, at the latest after `drain_timeout` seconds.

        Args: is_patient: while sessions are left and nobody else has these blocks, go on serving them.
        """
        self.drain_timeout = drain_timeout
        self.is_patient = is_patient
        self.told_to_leave.set()

    async def end_within(self, drain_timeout: float) -> None:
        """Wait for the end of a run that drains already, but for `drain_timeout` seconds at most."""
        with anyio.move_on_after(drain_timeout):
            await self.ended.wait()
        self.skip_drain()

    def skip_drain(self) -> None:
        """Wait for sessions no longer."""
        self.is_patient = False
        self.serving.skip_drain()
