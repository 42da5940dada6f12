"""Blocks from other servers instead of the Hub, without believing them.

What is believed, and how far:

* **The bytes are those of the asked hash**: checked here, always. Bytes that are not are thrown away, and the
  peer that sent them is not asked again.
* **The hash is that of the block**: a signed claim of its offerer. Among different claims the one that
  the most peers make is tried first. That is no proof: identities cost nothing, and a majority of liars can
  agree. So:
* **A sample is compared with the Hub**: `samples` small ranges at random places of each block, a few
  kilobytes. What offsets, shapes and dtypes must be is known exactly from the Hub's headers, and compared
  too. A peer that changes a share f of a block's bytes is found with probability 1 - (1 - f)^samples. One
  that differs convicts all peers that claim it. A change of a few bytes may pass: a server to which that
  matters sets `SWARMKIT_WEIGHTS_SOURCE=hub`.
* Without the Hub (offline, unreachable, or `source="peers"`) only names of tensors, sizes and the majority's
  word remain.

What is not found among peers comes from the Hub, block by block. There, what peers claim is good for a doubt:
a block with none of the claimed hashes is fetched a second time (see `store_fetch.py`).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import ModelError, PeerError, ProtocolError, TransportError
from swarmkit.models.checkpoint.byte_ranges import ByteRange
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.shards import OnBytes, Part
from swarmkit.models.checkpoint.store_format import FormatError, TensorPlace, lay_out, read_header, sha256_of
from swarmkit.models.checkpoint.store_hub import HubFiles
from swarmkit.models.plan import block_bytes
from swarmkit.net.registry import offers
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.transport.seam import Transport
from swarmkit.server.weights.service import WeightsSettings
from swarmkit.server.weights.transfer import WrongBytesError, locked, look_up, receive_file

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 4096
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


class _OtherThanHubError(Exception):
    """A file with the claimed hash is not the block: all peers that claim it are wrong."""


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
        clock: Callable[[], float] = SYSTEM_CLOCK.time,
    ) -> None:
        """Args: chance: picks peers and samples; unpredictable if not given, for liars would like to know."""
        self.liars: set[str] = set()
        self._transport = transport
        self._checkpoint = checkpoint
        self._files = files
        self._settings = settings
        self._chance = chance or random.SystemRandom()
        self._clock = clock
        self._hub_answers = True

    async def fetch(self, start: int, stop: int, on_bytes: OnBytes | None = None) -> FetchReport:
        """Have blocks `[start, stop)` in the store: from peers where that is possible, else from the Hub.

        Raises:
            ModelError: a block could not be fetched from any source that the settings allow.
        """
        report = FetchReport()
        parts = {block: self._checkpoint.block_parts(block, block + 1)[0] for block in range(start, stop)}
        has = self._files.has
        missing = [block for block in parts if not await anyio.to_thread.run_sync(has, parts[block])]
        offered = await self._look_up(missing) if missing else {}
        for block in missing:
            if not self._may_come_from_peers(parts[block]):
                continue
            if await self._fetch_block(block, parts[block], offered.get(block, []), report):
                report.from_peers.append(block)
        left = [block for block in missing if block not in report.from_peers]
        if left and self._settings.source == "peers":
            raise ModelError(
                f"No peer could give blocks {left} of {self._checkpoint.name}. Wait for a server that has "
                "them, or allow the Hub with SWARMKIT_WEIGHTS_SOURCE=any."
            )
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

    def _may_come_from_peers(self, part: Part) -> bool:
        if self._settings.source == "any":
            # Of a file that the Hub can only give whole, no sample can be had.
            return not (self._settings.samples and self._files.is_pickled(part))
        return self._settings.source == "peers"

    async def _look_up(self, blocks: Sequence[int]) -> Mapping[int, list[WeightsOffer]]:
        """What peers offer, by block."""
        fingerprint = await anyio.to_thread.run_sync(lambda: self._checkpoint.fingerprint)
        try:
            return await look_up(self._transport, fingerprint, blocks, self._clock())
        except TransportError as error:
            logger.warning("could not look up which peers have blocks: %s", error)
            return {}

    async def _fetch_block(
        self, block: int, part: Part, offered: Sequence[WeightsOffer], report: FetchReport
    ) -> bool:
        """Try the holders of what the most peers claim, and then of what fewer claim."""
        tries = self._settings.attempts
        for content in offers.most_claimed(offered):
            holders = [offer for offer in offered if offer.content == content]
            self._chance.shuffle(holders)
            for offer in holders:
                if offer.peer_id in self.liars:
                    continue
                if tries == 0:
                    return False
                tries -= 1
                try:
                    await self._fetch_from(offer, part, report)
                    return True
                except ProtocolError as error:
                    logger.warning("peer %s is not asked for weights again: %s", offer.peer_id, error)
                    self.liars.add(offer.peer_id)
                except _OtherThanHubError as error:
                    logger.warning("block %d from peers is refused: %s", block, error)
                    self.liars |= {offer.peer_id for offer in holders}
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
                        self._transport, offer, partial, self._settings.idle_timeout_s, report.count
                    )
                except ProtocolError:
                    store.discard(partial)
                    raise
                if await anyio.to_thread.run_sync(_sha256, partial) != offer.content:
                    store.discard(partial)
                    if alone:
                        raise WrongBytesError("its bytes do not have the hash that it offered")
                    raise PeerError("what several peers sent does not fit together", offer.peer_id)
            try:
                await anyio.to_thread.run_sync(self._check, part, path or partial)
            except _OtherThanHubError:
                store.discard(partial)
                raise
            if path is None:
                store.keep(partial, source, part.label, offer.content, "peers")
            else:
                store.link(source, part.label, offer.content, "peers")

    # ------------------------------------------------------------------ in a thread

    def _largest(self) -> int:
        """More than any honest file of a block can have: eight bytes a parameter."""
        import torch

        return block_bytes(self._checkpoint, torch.float64) + _MAX_HEADER_BYTES

    def _check(self, part: Part, path: Path) -> None:
        """Compare with what is known of the block without peers.

        Raises:
            _OtherThanHubError: it is not that block.
        """
        try:
            header = read_header(path)
        except FormatError as error:
            raise _OtherThanHubError(f"it is not a safetensors file: {error}") from None
        if set(header.places) != set(part.shards):
            raise _OtherThanHubError("it does not hold the block's tensors")
        if self._settings.source == "peers" or self._settings.samples == 0 or not self._hub_answers:
            return
        try:
            origin = {key: self._files.header(shard).places[key] for key, shard in part.shards.items()}
            if lay_out(origin.values()).front != header.front:
                raise _OtherThanHubError("its tensors have other shapes or dtypes than on the Hub")
            with path.open("rb") as file:
                self._compare(part, file, header.places, origin)
        except (ModelError, KeyError) as error:
            self._hub_answers = False
            logger.warning("blocks from peers are not compared with the Hub any more: %s", error)

    def _compare(
        self, part: Part, file: BinaryIO, here: Mapping[str, TensorPlace], origin: Mapping[str, TensorPlace]
    ) -> None:
        names = sorted(name for name in here if here[name].nbytes)
        weights = [here[name].nbytes for name in names]
        for name in self._chance.choices(names, weights, k=self._settings.samples) if names else ():
            length = min(SAMPLE_BYTES, here[name].nbytes)
            at = self._chance.randrange(here[name].nbytes - length + 1)
            file.seek(here[name].start + at)
            mine = file.read(length)
            start = origin[name].start + at
            if self._files.read_range(part.shards[name], ByteRange(start, start + length)) != mine:
                raise _OtherThanHubError(f"{name} differs from the Hub's")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of(file)
