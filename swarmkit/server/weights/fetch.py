"""Blocks from other servers instead of the Hub, without believing them.

A block comes from a peer only if its hash is known without any peer's word: the server's fingerprint covers
it (see `manifest.py` of the checkpoints), or the Hub has sent the block to this machine before. Bytes with
another hash are thrown away, whatever part of them was changed; the peer that sent them is not asked again,
and nothing of them is offered on. An identity costs nothing, so it does not matter how many peers claim that
a block has another hash: none of them is asked for it.

What is not found among peers comes from the Hub, block by block. There, what peers claim is good for a doubt:
a block of unknown hash with none of the claimed hashes is fetched a second time (see `store_fetch.py`).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from swarmkit.clock import system_date
from swarmkit.errors import ModelError, PeerError, ProtocolError, TransportError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.shards import OnBytes, Part
from swarmkit.models.checkpoint.store import Origin
from swarmkit.models.checkpoint.store_format import sha256_of
from swarmkit.models.checkpoint.store_hub import HubFiles
from swarmkit.models.plan import block_bytes
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.transport.seam import Transport
from swarmkit.server.weights.service import WeightsSettings
from swarmkit.server.weights.transfer import WrongBytesError, locked, look_up, receive_file

logger = logging.getLogger(__name__)

_NAMED = 3
"""Peers that a message names; more claims of one kind are only counted."""
_MAX_HEADER_BYTES = 4 * 1024 * 1024  # of a block's file, beside its tensors


@dataclass
class FetchReport:
    """Where some blocks came from.

    Attributes:
        from_peers, from_hub: blocks.
        peer_bytes: bytes of files that came from peers, those of liars included.
    """

    from_peers: list[int] = field(default_factory=list)
    from_hub: list[int] = field(default_factory=list)
    peer_bytes: int = 0

    def count(self, nbytes: int) -> None:
        """So many more bytes came from a peer."""
        self.peer_bytes += nbytes


class PeerWeights:
    """Fetches blocks of one model from its peers. Uses the store of the checkpoint's files."""

    def __init__(
        self,
        transport: Transport,
        checkpoint: Checkpoint,
        files: HubFiles,
        settings: WeightsSettings,
        *,
        chance: random.Random | None = None,
        clock: Callable[[], float] = system_date,
    ) -> None:
        """Args: chance: picks peers; unpredictable if not given."""
        self.liars: set[str] = set()
        self._transport = transport
        self._checkpoint = checkpoint
        self._files = files
        self._settings = settings
        self._chance = chance or random.SystemRandom()
        self._clock = clock

    async def fetch(self, start: int, stop: int, on_bytes: OnBytes | None = None) -> FetchReport:
        """Have blocks `[start, stop)` in the store: from peers where that is possible, else from the Hub.

        Raises:
            ModelError: a block could not be fetched from any source that the settings allow.
        """
        report = FetchReport()
        parts = {block: self._checkpoint.block_parts(block, block + 1)[0] for block in range(start, stop)}
        has = self._files.has
        missing = [block for block in parts if not await anyio.to_thread.run_sync(has, parts[block])]
        hashes = {block: await anyio.to_thread.run_sync(self._known_hash, parts[block]) for block in missing}
        offered = await self._look_up(missing) if missing else {}
        for block, content in hashes.items():
            if content is None or self._settings.source == "hub":
                continue
            holders = self._holders(block, content, offered.get(block, []))
            if await self._fetch_block(block, parts[block], holders, report):
                report.from_peers.append(block)
        left = [block for block in missing if block not in report.from_peers]
        if left and self._settings.source == "peers":
            raise ModelError(self._missing(left, unknown=any(hashes[block] is None for block in left)))
        if left:
            claims = {parts[block].label: self._claims(offered.get(block, [])) for block in left}
            await self._fetch_from_hub([parts[block] for block in left], on_bytes, claims)
            report.from_hub += left
        return report

    def _claims(self, offered: Sequence[WeightsOffer]) -> set[str]:
        """The hashes that a block has by the claims of peers that have not lied yet."""
        return {offer.content for offer in offered if offer.peer_id not in self.liars}

    async def _fetch_from_hub(
        self, parts: Sequence[Part], on_bytes: OnBytes | None, claims: Mapping[str, set[str]]
    ) -> None:
        """In a thread, which ends soon after this is cancelled; what has come is kept."""
        stopped = threading.Event()

        def progress(done: int, total: int) -> None:
            if stopped.is_set():
                raise ModelError("The download was stopped; start again to go on from there.")
            if on_bytes is not None:
                on_bytes(done, total)

        try:
            fetch = self._files.fetch
            await anyio.to_thread.run_sync(fetch, parts, progress, claims, abandon_on_cancel=True)
        finally:
            stopped.set()

    def _missing(self, blocks: Sequence[int], unknown: bool) -> str:
        name, fingerprint = self._checkpoint.name, self._checkpoint.fingerprint
        if unknown:
            return (
                f"Blocks {list(blocks)} of {name} cannot come from peers: the fingerprint {fingerprint} does "
                "not cover hashes of blocks, so that a wrong block could not be told from the right one. "
                f"`swarmkit fingerprint {name}` prints one that does, on a machine that may ask the Hub. Give"
                " it with --fingerprint, or allow the Hub with SWARMKIT_WEIGHTS_SOURCE=any."
            )
        return (
            f"No peer could give blocks {list(blocks)} of {name}. Wait for a server that has them, or allow "
            "the Hub with SWARMKIT_WEIGHTS_SOURCE=any."
        )

    async def _look_up(self, blocks: Sequence[int]) -> Mapping[int, list[WeightsOffer]]:
        """What peers offer, by block."""
        fingerprint = await anyio.to_thread.run_sync(lambda: self._checkpoint.fingerprint)
        try:
            return await look_up(self._transport, fingerprint, blocks, self._clock())
        except TransportError as error:
            logger.warning("could not look up which peers have blocks: %s", error)
            return {}

    def _holders(self, block: int, content: str, offered: Sequence[WeightsOffer]) -> list[WeightsOffer]:
        """The offers of a block's right content, in a random order."""
        holders = [offer for offer in offered if offer.content == content]
        others = sorted({offer.peer_id for offer in offered if offer.content != content})
        if others:
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            logger.warning(
                "what peer %s%s offer as block %d of %s is refused: it does not have the block's hash %s",
                ", ".join(others[:_NAMED]),
                more,
                block,
                self._checkpoint.name,
                content,
            )
        self._chance.shuffle(holders)
        return holders

    async def _fetch_block(
        self, block: int, part: Part, holders: Sequence[WeightsOffer], report: FetchReport
    ) -> bool:
        """Try the peers that offer a block's right content."""
        believed = [offer for offer in holders if offer.peer_id not in self.liars]
        for offer in believed[: self._settings.attempts]:
            try:
                await self._fetch_from(offer, part, report)
                return True
            except ProtocolError as error:  # noqa: PERF203
                logger.warning(
                    "block %d from peer %s is refused, and the peer is not asked again: %s",
                    block,
                    offer.peer_id,
                    error,
                )
                self.liars.add(offer.peer_id)
            except PeerError as error:
                logger.info("block %d could not be had from peer %s: %s", block, offer.peer_id, error)
        return False

    async def _fetch_from(self, offer: WeightsOffer, part: Part, report: FetchReport) -> None:
        store, source = self._files.store, self._files.source
        partial = store.partial("peers", offer.content)
        async with locked(store.fetch_lock("peers", offer.content)):
            path = await anyio.to_thread.run_sync(store.open, offer.content)
            if path is None:
                if offer.size > await anyio.to_thread.run_sync(self._largest):
                    raise WrongBytesError(f"a block of {offer.size} bytes is too large")
                await anyio.to_thread.run_sync(store.reserve, partial, offer.size)
                try:
                    alone = await receive_file(
                        self._transport, offer, store, partial, self._settings.idle_timeout_s, report.count
                    )
                except ProtocolError:
                    store.discard(partial)
                    raise
                if await anyio.to_thread.run_sync(_sha256, partial) != offer.content:
                    store.discard(partial)
                    if alone:
                        raise WrongBytesError("its bytes do not have the hash that it offered")
                    raise PeerError("what several peers sent does not fit together", offer.peer_id)
            # Of a hash that came from the Hub, whether the block is public is asked of the Hub.
            origin: Origin = "peers" if self._files.block_hashes else "hub"
            if path is None:
                store.keep(partial, source, part.label, offer.content, origin)
            else:
                store.link(source, part.label, offer.content, origin)

    # ------------------------------------------------------------------ in a thread

    def _largest(self) -> int:
        """More than any honest file of a block can have: eight bytes a parameter."""
        import torch

        return block_bytes(self._checkpoint, torch.float64) + _MAX_HEADER_BYTES

    def _known_hash(self, part: Part) -> str | None:
        """What the block's hash is, without a peer's word."""
        return self._files.known_hash(part)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of(file)
