"""`Node`: the root of everything that one process does in a swarm."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
from anyio.abc import TaskGroup, TaskStatus

from swarmkit.client.swarm.client import SwarmClient
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.errors import TransportError, UsageError, unwrapped
from swarmkit.net.connect import TransportFactory, identity_for, joined
from swarmkit.net.rpc.dial_back import DialBackService
from swarmkit.net.transport.identity import Identity
from swarmkit.server.config import ServerConfig
from swarmkit.server.engine.engines import Engines
from swarmkit.server.head_start import running
from swarmkit.server.model_server import ModelServer
from swarmkit.server.weights.service import WeightsService, WeightsSettings


class Node:
    """One peer of a swarm and its parts: any number of servers and clients. All of it is one task, `run`.

    ::

        Node.run ── transport ── p2p daemon (a child process)
              ├── engines: one thread for each device
              ├── ModelServer.run, one for each model that is served
              └── SwarmClient.run, one for each model that is used
    """

    def __init__(
        self,
        transport: TransportFactory,
        identity: Identity | None = None,
        *,
        weights: WeightsSettings | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Prepare a node.

        Args:
            transport: how to reach the swarm.
            identity: the key pair whose public half is this peer's name; a new one if not given.
            weights: how the files of blocks are handed out to other peers.
        """
        self.identity = identity or identity_for(transport)
        self.servers: list[ModelServer] = []
        """The servers that begin with the node, and those that run."""
        self._factory = transport
        self._weights_settings = weights or WeightsSettings()
        self._clock = clock
        self._stop = anyio.Event()
        self._drain_timeout: float | None = None
        self._life: anyio.CancelScope | None = None
        self._parts: TaskGroup | None = None
        self._clients: set[SwarmClient] = set()
        self._no_clients = anyio.Event()

    @property
    def peer_id(self) -> str:
        """This peer's name."""
        return self.identity.peer_id

    @property
    def addresses(self) -> Sequence[str]:
        """Where other peers can dial this one; none before it runs."""
        return self._transport.addresses if self._parts is not None else ()

    def add(self, config: ServerConfig) -> ModelServer:
        """Have a server begin with the node, which does not run yet."""
        if self._parts is not None:
            raise UsageError("this node runs already; use `await node.serve(config)`")
        server = self.new_server(config)
        self.servers.append(server)
        return server

    def new_server(self, config: ServerConfig) -> ModelServer:
        """A server for `start`."""
        return ModelServer(config, self.peer_id, self._clock)

    def request_stop(self, drain_timeout: float | None = None) -> None:
        """End all parts, servers after their sessions have had `drain_timeout` seconds to move away, and then
        the node.
        """
        self._drain_timeout = drain_timeout
        self._stop.set()

    def skip_drain(self) -> None:
        """While stopping: wait for sessions no longer."""
        for server in self.servers:
            server.skip_drain()

    def crash(self) -> None:
        """End as a crash would: nothing is announced, streams just end."""
        if self._life is not None:
            if self._parts is not None:  # else parts that end could still tell their clients something
                self._transport.kill()
            self._life.cancel()

    # ------------------------------------------------------------------ life

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Own the transport and all parts until `request_stop` or `crash`, or until cancelled.

        It has started when the servers that were added serve.

        Raises:
            TransportError: the swarm cannot be reached, or a server could not announce itself for too long.
            Exception: what a server that was added raises when it starts.
        """
        try:
            with anyio.CancelScope() as self._life, unwrapped():
                await self._run(task_status)
        except TransportError:  # parts may find the transport killed before they are cancelled
            if self._life is None or not self._life.cancel_called:
                raise

    async def _run(self, task_status: TaskStatus[None]) -> None:
        async with (
            running([server.head_start for server in self.servers]),
            joined(self._factory, self.identity, self._clock) as (self._transport, self._registry),
            Engines(self._clock) as self._engines,
            anyio.create_task_group() as self._parts,
        ):
            self._weights = WeightsService(
                self._weights_settings,
                busy=lambda: self._engines.waiting > 0,
                clock=self._clock.now,
            )
            await DialBackService(self._transport).start()
            for server in self.servers:
                await self._parts.start(self._run_server, server)
            task_status.started()
            await self._stop.wait()
            await self._end_clients()  # first, because they may use these servers
            for server in self.servers:
                server.request_stop(self._drain_timeout)

    async def _run_server(
        self, server: ModelServer, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        config = server.config
        try:
            await server.run(
                transport=self._transport,
                registry=self._registry,
                engine=self._engines.of(config.device, config.settings.engine),
                weights=self._weights,
                task_status=task_status,
            )
        finally:
            self.servers.remove(server)

    async def run_client(
        self, client: SwarmClient, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Run a client over this node's transport until it is told to stop, or the node is."""
        self._check_running()
        self._clients.add(client)
        try:
            await client.run(transport=self._transport, registry=self._registry, task_status=task_status)
        finally:
            self._clients.remove(client)
            if not self._clients:
                self._no_clients.set()

    async def serve(self, config: ServerConfig) -> ModelServer:
        """Serve one more model; returns when clients can use it."""
        server = self.new_server(config)
        await self.start(server)
        return server

    async def start(self, server: ModelServer) -> None:
        """Run one more server, made by `new_server`; returns when clients can use it."""
        self._check_running()
        assert self._parts is not None
        self.servers.append(server)
        await self._parts.start(self._run_server, server)

    async def _end_clients(self) -> None:
        for client in self._clients:
            client.request_stop()
        if self._clients:
            self._no_clients = anyio.Event()
            await self._no_clients.wait()

    def _check_running(self) -> None:
        if self._parts is None or self._stop.is_set():
            raise UsageError("this node does not run; start it first, or make a new one")
