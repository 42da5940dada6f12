"""A server's weights, from wherever they come, and its offers of them (and of the manifest) to others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread

from swarmkit.clock import system_date
from swarmkit.errors import ModelError, TransportError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.shards import OnBytes
from swarmkit.models.checkpoint.store_hub import HubFiles
from swarmkit.models.checkpoint.store_pinned import keep_manifest
from swarmkit.net.protocol.messages import MAX_ADDRESSES
from swarmkit.net.protocol.weights_messages import WEIGHTS
from swarmkit.net.registry import offers
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.rpc.endpoints import listen
from swarmkit.net.transport.seam import Transport
from swarmkit.server.weights.fetch import FetchReport, PeerWeights
from swarmkit.server.weights.service import WeightsService, WeightsSettings

logger = logging.getLogger(__name__)


class SharedWeights:
    """One server's part in passing a model's blocks around.

    Only blocks in the store are offered: those that came from the Hub or from peers, of a repository that
    every peer may read. Weights in a folder are private, and gated ones are their owner's to give.
    """

    def __init__(
        self,
        transport: Transport,
        checkpoint: Checkpoint,
        settings: WeightsSettings | None = None,
        *,
        service: WeightsService | None = None,
        clock: Callable[[], float] = system_date,
    ) -> None:
        """Args: service: hands out files, also those of the peer's other servers; its own if not given."""
        self.settings = settings or WeightsSettings()
        self.service = service or WeightsService(self.settings)
        self._shared: list[tuple[int, int]] = []
        """The runs of blocks that are shared now."""
        self.transport = transport
        self.checkpoint = checkpoint
        self._files = checkpoint.files if isinstance(checkpoint.files, HubFiles) else None
        self._clock = clock
        self._peers: PeerWeights | None = None
        if self._files is not None:
            self._peers = PeerWeights(transport, checkpoint, self._files, self.settings, clock=clock)

    async def fetch(self, start: int, stop: int, on_bytes: OnBytes | None = None) -> FetchReport:
        """Have blocks `[start, stop)` on this machine, so that loading them needs no network.

        Args:
            on_bytes: of what comes from the Hub; called from another thread.

        Raises:
            ModelError: they cannot be had.
        """
        if self._peers is None:
            return FetchReport()
        return await self._peers.fetch(start, stop, on_bytes)

    @asynccontextmanager
    async def sharing(self, start: int, stop: int) -> AsyncIterator[None]:
        """`run` beside what is done within; its failure is logged and ends nothing else."""
        self._shared.append((start, stop))
        task = asyncio.create_task(self.run(start, stop))
        try:
            yield
        finally:
            task.cancel()
            self._shared.remove((start, stop))
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
                await anyio.to_thread.run_sync(self._withdraw, start, stop)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("handing out weights failed: %s", error, exc_info=error)

    async def run(self, start: int, stop: int) -> None:
        """Offer blocks `[start, stop)` and hand them out, until cancelled."""
        if self._files is None or not self.settings.share:
            return
        files = self._files
        if not await anyio.to_thread.run_sync(lambda: files.is_public, abandon_on_cancel=True):
            logger.info("%s is not public: its blocks are not offered to other servers", files.repo)
            return
        await listen(self.transport, WEIGHTS, self.service.serve)
        while True:
            try:
                await self.offer(start, stop)
            except (TransportError, ModelError) as error:
                logger.warning("could not offer weights to other servers, will try again: %s", error)
            await anyio.sleep(self.settings.offer_lifetime_s / 3)

    async def offer(self, start: int, stop: int) -> int:
        """Announce once which files are handed out; how many blocks these are."""
        fingerprint = await anyio.to_thread.run_sync(lambda: self.checkpoint.fingerprint)
        expires_at = self._clock() + self.settings.offer_lifetime_s
        held: list[tuple[str, int | None, str, int]] = [
            (full, None, *file)
            for full, file in (await anyio.to_thread.run_sync(self._held_manifests)).items()
        ]
        blocks = 0
        for block in range(start, stop):
            file = await anyio.to_thread.run_sync(self._held, block)
            if file is not None:
                held.append((fingerprint, block, *file))
                blocks += 1
        records: list[tuple[str, bytes]] = []
        for meant, what, content, size in held:
            offer = WeightsOffer(
                peer_id=self.transport.peer_id,
                fingerprint=meant,
                block=what,
                content=content,
                size=size,
                addresses=tuple(self.transport.addresses)[:MAX_ADDRESSES],
                expires_at=expires_at,
            )
            value = offers.sign(offer, self.transport.identity)
            records += [(key, value) for key in offers.keys_of(offer)]
        if records:
            await self.transport.store(records, expires_at)
        return blocks

    def _withdraw(self, start: int, stop: int) -> None:
        """Hand blocks out no longer, but for those that another run of blocks shares."""
        if self._files is None:
            return
        for block in range(start, stop):
            content = self.checkpoint.block_content(block)
            if content is not None and not any(low <= block < high for low, high in self._shared):
                self.service.withdraw(content)

    def _held_manifests(self) -> dict[str, tuple[str, int]]:
        """By fingerprint, content and size of the manifests that are here; from now on they are handed out.

        That without hashes of blocks is for peers that were given the fingerprint which does not cover them.
        """
        assert self._files is not None
        manifest, full = self.checkpoint.manifest, self.checkpoint.full_manifest()
        found = {}
        for each in (manifest.without_blocks, *([] if full is None else [full])):
            if each.can_be_shared:
                path = keep_manifest(self._files.store, each)
                self.service.offer(each.content, path)
                found[each.full_fingerprint] = each.content, path.stat().st_size
        return found

    def _held(self, block: int) -> tuple[str, int] | None:
        """Content and size of a block's file, if it is in the store; from now on it is handed out."""
        assert self._files is not None
        content = self.checkpoint.block_content(block)
        if content is None:
            return None
        path = self._files.store.open(content)
        if path is None:  # it was damaged since it was offered last
            self.service.withdraw(content)
            return None
        self.service.offer(content, path)
        return content, path.stat().st_size
