"""The synchronous handle on a `SwarmClient` that lives on the background event loop."""

from __future__ import annotations

import atexit
import concurrent.futures
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

import anyio
from anyio.abc import TaskStatus

from swarmkit.client.swarm.client import SwarmClient
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import TransportError, UsageError
from swarmkit.net import portal
from swarmkit.net.connect import TransportFactory, identity_for, joined
from swarmkit.net.transport.identity import Identity

T = TypeVar("T")

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 30.0
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


class ClientHost(Protocol):
    """What runs a client over a transport: a `Node`, or `AloneHost` for a process that has none."""

    async def run_client(self, client: SwarmClient, *, task_status: TaskStatus[None]) -> None:
        """Run a client until it is told to stop."""


class AloneHost:
    """A client's own membership in the swarm, with a transport for nothing else."""

    def __init__(
        self, transport: TransportFactory, clock: Clock = SYSTEM_CLOCK, identity: Identity | None = None
    ) -> None:
        """Args: identity: the key pair that names the client; a new one for each run if not given."""
        self._factory = transport
        self._clock = clock
        self._identity = identity

    async def run_client(
        self, client: SwarmClient, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """See `ClientHost.run_client`."""
        async with joined(self._factory, self._identity or identity_for(self._factory), self._clock) as (
            transport,
            registry,
        ):
            await client.run(transport=transport, registry=registry, task_status=task_status)


class Connection:
    """Owns a swarm client's task and a lease of the event loop; ends both when closed or forgotten."""

    def __init__(self, make_client: Callable[[], SwarmClient], host: ClientHost) -> None:
        """Connect. Blocks until the first look at the swarm is done.

        Args:
            make_client: called on the event loop's thread.
            host: runs the client.

        Raises:
            TransportError: networking could not start, or no initial peer answered.
        """
        self._lease = portal.lease()
        try:
            self.client = self._lease.call(_called(make_client))
            running, _ = self._lease.start_task(host.run_client, self.client)
        except BaseException:
            self._lease.close()
            raise
        self._forgotten = weakref.finalize(self, _end_later, self._lease, self.client, running)
        self._forgotten.atexit = False  # what is open at the end of the program is closed, and waited for
        _connections.add(self)

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run a coroutine function on the event loop and wait for its result."""
        try:
            return self._lease.call(function, *args)
        except (concurrent.futures.CancelledError, TransportError):
            if self._forgotten.alive:
                raise
            raise UsageError("the model was closed while it was used; load it again") from None

    def call_soon(self, function: Callable[[], object]) -> None:
        """Run a quick function on the event loop without waiting; safe in finalizers, quiet after the end."""
        self._lease.call_soon(function)

    @property
    def closed(self) -> bool:
        """Whether it has left the swarm."""
        return not self._forgotten.alive

    def close(self) -> None:
        """Leave the swarm and end everything that belongs to it. May be called twice."""
        owned = self._forgotten.detach()
        if owned is None:
            return
        _, _, (lease, client, running), _ = owned
        if threading.current_thread().name == portal.THREAD_NAME:  # which cannot wait for itself
            _end_later(lease, client, running)
        else:
            _end(lease, client, running)


def _called(function: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    async def call() -> T:
        return function()

    return call


def _end(lease: portal.PortalLease, client: SwarmClient, running: Future[None]) -> None:
    lease.call_soon(client.request_stop)
    concurrent.futures.wait([running], _END_TIMEOUT_S)
    if not running.done():
        logger.warning("leaving the swarm takes long and is given up")
    elif not running.cancelled() and (error := running.exception()) is not None:
        logger.warning("the connection to the swarm had failed: %s", error)
    lease.close()


def _end_later(lease: portal.PortalLease, client: SwarmClient, running: Future[None]) -> None:
    """End without waiting and without a lock.

    The garbage collector calls this in any thread at any point: on the loop's own thread, or in one that
    holds a lock which the loop needs next. The lease is given back by a thread that the loop starts at last.
    """

    def give_back(_: object) -> None:
        threading.Thread(target=lease.close, name="swarmkit-close", daemon=True).start()

    def stop() -> None:
        client.request_stop()
        running.add_done_callback(give_back)

    lease.call_soon(stop)


@atexit.register
def _end_all() -> None:
    for connection in list(_connections):
        connection.close()
