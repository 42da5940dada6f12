"""`Serving`: one run of a model's blocks, from the moment that clients can use it until none does.

A server may end one and begin another while its peer stays: see `ModelServer.move`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack
from types import TracebackType

import anyio

from swarmkit.models.adapters.adapter import Adapter
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.plan import cache_cost
from swarmkit.net.protocol.adapter_messages import ADAPTER
from swarmkit.net.protocol.gradient_messages import GRADIENT
from swarmkit.net.protocol.handover_messages import HANDOVER
from swarmkit.net.protocol.logits_messages import LOGITS
from swarmkit.net.protocol.messages import PUSH, SESSION, printable
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.registry.records import HostedAdapter
from swarmkit.net.rpc.endpoints import listen, unlisten
from swarmkit.net.rpc.receive_budget import ReceiveBudget
from swarmkit.net.transport.seam import Handler, Transport
from swarmkit.server.adapters.service import AdapterService
from swarmkit.server.cache.kv_budget import KVBudget
from swarmkit.server.engine.engine import Engine
from swarmkit.server.head.service import HeadService
from swarmkit.server.quota import ClientQuota
from swarmkit.server.sessions.handover import HandoverService
from swarmkit.server.sessions.links import Links
from swarmkit.server.sessions.service import BlockService
from swarmkit.server.training.service import GradientService
from swarmkit.server.weights.share import SharedWeights
from swarmkit.settings import Limits, ServerSettings


class Serving:
    """Serves a stage to sessions, training and adapters, and offers its weights, inside an `async with`.

    Attributes:
        service: the number of the service at this peer; the names of its endpoints contain it.
        sessions, handover, gradients, adapters: what answers the requests of each kind.
        engine: computes what they ask for.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        service: int,
        checkpoint: Checkpoint,
        fingerprint: str,
        hosted: Iterable[tuple[str, str, Adapter]],
        transport: Transport,
        engine: Engine,
        cache: KVBudget,
        receive_budget: ReceiveBudget,
        quota: ClientQuota,
        weights: SharedWeights,
        links: Links | None,
        settings: ServerSettings,
        head: HeadService | None = None,
    ) -> None:
        """Prepare to serve a stage.

        Args:
            hosted: adapters for every client: hash, label, and the part for the stage's blocks.
            engine: runs all that is computed.
            cache, receive_budget, quota: memory, and what each client may have computed; servings of the same
                model share them.
            weights: offers the blocks' files to other servers.
            links: how to reach servers with the next blocks; None: outputs go to clients only.
            head: computes the output layer for clients; None: nothing does.
        """
        self.stage = stage
        self.engine = engine
        self.service = service
        kv_bytes = cache_cost(checkpoint, stage.dtype).token_bytes
        self.sessions = BlockService(
            stage,
            fingerprint,
            kv_bytes,
            engine,
            settings,
            links,
            budget=cache,
            receive_budget=receive_budget,
            quota=quota,
        )
        self.handover = HandoverService(stage, self.sessions, kv_bytes, engine, settings, links)
        for digest, label, adapter in hosted:
            self.sessions.adapters.host(digest, label, adapter)
        store = self.sessions.adapters
        self.adapters = AdapterService(stage, fingerprint, engine, settings, receive_budget, store)
        self.gradients = GradientService(
            stage, fingerprint, engine, settings, receive_budget, lambda: self.sessions.leaving, store, quota
        )
        self.head = head
        self._transport = transport
        self._weights = weights
        self._owned = AsyncExitStack()

    @property
    def blocks(self) -> tuple[int, int]:
        """The blocks [a, b) that are served."""
        return self.stage.start, self.stage.stop

    @property
    def hosted(self) -> tuple[HostedAdapter, ...]:
        """The adapters that every client may use."""
        hosted = self.sessions.adapters.hosted.items()
        return tuple(HostedAdapter(printable(label)[-96:], digest) for digest, label in hosted)

    def set_limits(self, limits: Limits) -> None:
        """Keep within other limits from the next step on."""
        self.sessions.set_limits(limits)
        self.gradients.kept.set_capacity(limits.activation_cache_bytes)

    async def drain(self, timeout: float) -> bool:
        """Take no new sessions, and give those that are open `timeout` seconds to move to other servers.

        Returns: whether all have left.
        """
        return await self.sessions.drain(timeout)

    def skip_drain(self) -> None:
        """End a `drain` that is under way."""
        self.sessions.stop_waiting()

    async def __aenter__(self) -> Serving:
        handlers: list[tuple[Protocol, Handler]] = [
            (ADAPTER, self.adapters.serve),
            (PUSH, self.sessions.serve_pushes),
            (HANDOVER, self.handover.serve),
            (GRADIENT, self.gradients.serve),
            (SESSION, self.sessions.serve),
        ]
        if self.head is not None:
            handlers.insert(0, (LOGITS, self.head.serve))
        try:
            for protocol, handler in handlers:
                self._owned.push_async_callback(self._end_streams, protocol)
                await listen(self._transport, protocol, handler, self.service)
            await self._owned.enter_async_context(self._weights.sharing(*self.blocks))
        except BaseException:
            await self._owned.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all streams, and with them the sessions that are left; after a crash without a word."""
        if kind is None:
            self.sessions.leaving = True
        await self._owned.aclose()

    async def _end_streams(self, protocol: Protocol) -> None:
        """End all streams of a protocol, even while this task is being cancelled."""
        with anyio.CancelScope(shield=True):
            await unlisten(self._transport, protocol, self.service)
