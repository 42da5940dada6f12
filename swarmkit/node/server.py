"""`Server`: the synchronous face of a node that serves one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Literal

import torch

from swarmkit.errors import UsageError
from swarmkit.events import EventStream
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.net import portal
from swarmkit.net.connect import TransportFactory, identity_for, over_hivemind
from swarmkit.net.transport.rates import StreamTraffic
from swarmkit.net.transport.swarm_key import SwarmKey
from swarmkit.node.node import Node
from swarmkit.server.config import ServerConfig
from swarmkit.server.serving import Serving
from swarmkit.server.weights.manifest import open_with_fingerprint
from swarmkit.server.weights.service import WeightsSettings
from swarmkit.settings import Limits, ServerSettings


class Server:
    """Serves some blocks of a model to a swarm, from `start()` to `stop()` (or a `with` block).

    Example::

        with swarmkit.Server("tiny-chat", blocks=(0, 4)) as server:
            print(server.addresses)
            server.wait()

    Args:
        model: `"tiny-chat"`, a local folder, or a Hub repo id; or an opened `Checkpoint`.
        initial_peers: addresses of peers of the swarm to join; none = start a swarm.
        blocks: serve exactly blocks [a, b); otherwise they are chosen where the swarm is weakest.
        num_blocks: how many to choose; `"auto"` = as many as fit into memory; all blocks if not given.
        memory_bytes: memory to plan with for `"auto"`; what the device has free if not given.
        device: a torch device.
        dtype: a precision: float32, bfloat16, float16, int8 or nf4; `"auto"` = float32 on CPU, the
            checkpoint's own elsewhere.
        public_name: how this server is called in status pages.
        fingerprint: of the model, from a trusted source. With it the config comes from peers, not the Hub,
            and with weights from peers only (`WeightsSettings(source="peers")`) the Hub is asked nothing.
        identity_path: a file that keeps this server's key, so that its name and address stay the same.
        weights: where the blocks' weights may come from, and what is handed on to others.
        adapters: folders or Hub repositories of LoRA adapters (as PEFT saves them) to host for everybody.
        transport: how to reach the swarm; over hivemind on loopback if not given.
        node: runs this server beside others, over its connection to the swarm, such as `other_server.node`; a
            node of its own if not given. Then `initial_peers`, `identity_path`, `transport` and `swarm_key`
            are not used.
        swarm_key: the file with the key of a private swarm, as `swarmkit swarm-key` writes one. Not used with
            `transport`.

    Raises:
        UsageError: blocks outside the model.
        ModelError: the checkpoint cannot be found or read, or has another fingerprint.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Checkpoint,
        *,
        initial_peers: Sequence[str] = (),
        blocks: tuple[int, int] | None = None,
        num_blocks: int | Literal["auto"] | None = None,
        memory_bytes: int | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "auto",
        public_name: str = "",
        fingerprint: str | None = None,
        identity_path: str | os.PathLike[str] | None = None,
        transport: TransportFactory | None = None,
        swarm_key: SwarmKey | str | os.PathLike[str] | None = None,
        node: Node | None = None,
        weights: WeightsSettings | None = None,
        settings: ServerSettings | None = None,
        adapters: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        if fingerprint is not None:
            lookup = transport or over_hivemind(initial_peers, client_mode=True, swarm_key=swarm_key)
            model = open_with_fingerprint(model, fingerprint, lookup, weights)
        config = ServerConfig(
            checkpoint=Checkpoint.open(model),
            blocks=blocks,
            num_blocks=num_blocks,
            memory_bytes=memory_bytes,
            device=device,
            dtype=dtype,
            public_name=public_name,
            adapters=tuple(os.fspath(adapter) for adapter in adapters),
            weights=weights or WeightsSettings(),
            settings=settings or ServerSettings(),
        )
        self._name = config.checkpoint.name
        self._is_guest = node is not None
        if node is None:
            transport = transport or over_hivemind(initial_peers, swarm_key=swarm_key)
            node = Node(transport, identity_for(transport, identity_path), weights=config.weights)
            self._server = node.add(config)
        else:
            self._server = node.new_server(config)
        self._node = node
        self._lease: portal.PortalLease | None = None
        self._running: Future[None] | None = None
        self.peer_id = node.peer_id

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks [a, b) that are served."""
        return self._server.blocks

    @property
    def addresses(self) -> list[str]:
        """Where this server can be dialled; other peers take them as `initial_peers`."""
        return list(self._node.addresses)

    @property
    def events(self) -> EventStream:
        """What happens in this server; `subscribe()` before `start()` to miss nothing."""
        return self._server.events

    @property
    def node(self) -> Node:
        """The node that runs the server; it can serve other models and run clients as well."""
        return self._node

    @property
    def serving(self) -> Serving | None:
        """The run of blocks that new sessions find here; None before `start`."""
        return self._server.serving

    @property
    def servings(self) -> list[Serving]:
        """All runs of blocks that have sessions: the one for new sessions, and those that drain."""
        return self._server.servings

    @property
    def traffic(self) -> StreamTraffic:
        """What the server's streams have sent and received; the table of the swarm is not counted."""
        return self._server.traffic

    def start(self) -> Server:
        """Load, announce and serve; returns when clients can use the server."""
        if self._running is not None:
            raise UsageError("this server was started before; make a new one")
        self._lease = portal.lease()
        try:
            if self._is_guest:
                self._lease.call(self._node.start, self._server)
                self._running = self._lease.start_task_soon(self._server.ended.wait)
            else:
                self._running, _ = self._lease.start_task(self._node.run)
        except BaseException:
            self._lease.close()
            raise
        return self

    @property
    def alive(self) -> bool:
        """Whether it has started and has not ended."""
        return self._running is not None and not self._running.done()

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self._server.limits

    def set_limits(self, limits: Limits) -> None:
        """Keep within other limits from the next step on. Steps that run are finished.

        Sessions that no longer fit end, the longest idle first, and their clients go on at other servers::

            server.set_limits(server.limits.replace(max_sessions=2, threads=1))
        """
        if self._lease is None:
            self._server.set_limits(limits)
        else:
            self._lease.call(self._set_limits, limits)

    def move(self, blocks: tuple[int, int]) -> None:
        """Serve other blocks [a, b) from now on; returns when clients can use them.

        Sessions of the old blocks have the settings' `drain_timeout_s` to move to other servers.

        Raises:
            UsageError: the blocks are outside the model, or the server does not run.
            ModelError: their weights cannot be had; the old blocks are served as before.
        """
        if self._lease is None:
            raise UsageError("this server does not run, so that it cannot move; start it first")
        self._lease.call(self._server.move, blocks)

    def stop(self, drain_timeout: float | None = None) -> None:
        """Leave cleanly: announce it, finish running steps, give sessions time to move away.

        Args:
            drain_timeout: seconds for sessions to move; the settings' `drain_timeout_s` if not given.
        """
        if self._lease is None or self._running is None:
            return
        part = self._server if self._is_guest else self._node
        self._lease.call_soon(lambda: part.request_stop(drain_timeout))
        self._finish()

    def skip_drain(self) -> None:
        """While `stop` waits in another thread: wait for sessions no longer."""
        if self._lease is not None:
            self._lease.call_soon(self._server.skip_drain)

    def kill(self) -> None:
        """End at once, as a crash would: nothing is announced, streams just end."""
        if self._lease is None or self._running is None:
            return
        self._lease.call_soon(self._server.crash if self._is_guest else self._node.crash)
        self._finish()

    def wait(self, timeout: float | None = None) -> None:
        """Block until the server has stopped, or raise TimeoutError."""
        if self._running is not None:
            self._running.result(timeout)

    async def _set_limits(self, limits: Limits) -> None:
        self._server.set_limits(limits)

    def _finish(self) -> None:
        assert self._lease is not None
        assert self._running is not None
        try:
            self._running.result()
        finally:
            self._lease.close()
            self._lease = None

    def __repr__(self) -> str:
        low, high = self.blocks
        state = (
            "not running" if self._lease is None else f"at {', '.join(self.addresses) or 'no address yet'}"
        )
        return f"<Server of {self._name}, blocks {low}:{high}; {state}>"

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
