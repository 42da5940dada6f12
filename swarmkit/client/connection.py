"""The synchronous handle on a `SwarmClient` that lives on the background event loop."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

from swarmkit.client.swarm import SwarmClient
from swarmkit.net import portal
from swarmkit.net.tasks import start_task

T = TypeVar("T")


class Connection:
    """Owns a swarm client's task and a lease of the event loop; ends both when closed or forgotten."""

    def __init__(self, make_client: Callable[[], SwarmClient]) -> None:
        """Connect. Blocks until the first look at the swarm is done.

        Args:
            make_client: called on the event loop's thread.

        Raises:
            TransportError: networking could not start, or no initial peer answered.
        """
        self._lease = portal.lease()
        try:
            self.client = self._lease.call(_called(make_client))
            running = start_task(self._lease, self.client.run)
        except BaseException:
            self._lease.close()
            raise
        self._end = weakref.finalize(self, _end, self._lease, self.client, running)

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a coroutine function on the event loop and wait for its result."""
        return self._lease.call(function, *args)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Run a quick function on the event loop without waiting; safe in finalizers, quiet after the end."""
        self._lease.call_soon(function)

    def close(self) -> None:
        """Leave the swarm and end everything that belongs to it. May be called twice."""
        self._end()


def _called(function: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    async def call() -> T:
        return function()

    return call


def _end(lease: portal.Lease, client: SwarmClient, running: Future[None]) -> None:
    lease.call_soon(client.request_stop)

    def finish() -> None:
        try:
            running.result(timeout=30)
        finally:
            lease.close()

    if threading.current_thread().name == portal.THREAD_NAME:
        # The garbage collector may forget a model on the loop's own thread, which must never wait for itself.
        threading.Thread(target=finish, name="swarmkit-close", daemon=True).start()
    else:
        finish()
