"""A server whose engine stands still, so that a step waits there for as long as a test needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from swarmkit.net import portal
from swarmkit.server.engine.engine import Engine
from tests.waiting import WITHIN


@contextmanager
def held_engine(engine: Engine) -> Iterator[None]:
    """Let a server's engine finish what it computes, and then nothing more until the block ends."""
    begun, over = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        over.wait(WITHIN)

    with portal.lease() as lease:
        holding = lease.start_task_soon(engine.run, hold)
        try:
            assert begun.wait(WITHIN), "the engine is held"
            yield
        finally:
            over.set()
            holding.result(WITHIN)
