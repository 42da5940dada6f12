"""Starting without the Hub: a model's manifest from peers, for a server that was given a fingerprint.

A fingerprint can be believed from the Hub or from the user, never from peers; with one, any peer's manifest
can be checked (see `swarmkit/models/checkpoint/manifest.py`).
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable

import anyio.to_thread

from swarmkit.clock import system_date
from swarmkit.errors import PeerError, ProtocolError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, ManifestError, is_fingerprint
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_pinned import find_manifest, keep_manifest
from swarmkit.net import portal
from swarmkit.net.connect import TransportFactory, identity_for
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.transport.seam import Transport
from swarmkit.server.weights.service import WeightsSettings
from swarmkit.server.weights.transfer import locked, look_up, receive_file

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
"""Offers that are tried. More are no use: a peer that fills the table with lies has more of them."""


async def fetch_manifest(
    transport: Transport,
    store: BlockStore,
    fingerprint: str,
    settings: WeightsSettings | None = None,
    *,
    chance: random.Random | None = None,
    clock: Callable[[], float] = system_date,
) -> Manifest | None:
    """Have the manifest with this fingerprint in the store; None if no peer gave it."""
    found = await look_up(transport, fingerprint, [None], clock())
    offered = [offer for offer in found.get(None, []) if offer.size <= MAX_MANIFEST_BYTES]
    (chance or random.SystemRandom()).shuffle(offered)
    for offer in offered[:_ATTEMPTS]:
        try:
            manifest = await _fetch_from(transport, store, offer, settings or WeightsSettings())
        except (ManifestError, ProtocolError) as error:  # noqa: PERF203
            logger.warning("peer %s offers no manifest of %s: %s", offer.peer_id, fingerprint, error)
        except PeerError as error:
            logger.info("the manifest could not be had from peer %s: %s", offer.peer_id, error)
        else:
            await anyio.to_thread.run_sync(keep_manifest, store, manifest)
            return manifest
    return None


async def _fetch_from(
    transport: Transport, store: BlockStore, offer: WeightsOffer, settings: WeightsSettings
) -> Manifest:
    partial = store.partial("peers", offer.content)
    async with locked(store.fetch_lock("peers", offer.content)):
        store.discard(partial)  # it is small: half a transfer is not worth its traces
        await anyio.to_thread.run_sync(store.reserve, partial, offer.size)
        try:
            await receive_file(transport, offer, store, partial, settings.idle_timeout_s, lambda nbytes: None)
            encoded = await anyio.to_thread.run_sync(partial.read_bytes)
        finally:
            store.discard(partial)
    return await anyio.to_thread.run_sync(Manifest.decode, encoded, offer.fingerprint)


def open_with_fingerprint(
    model: str | os.PathLike[str] | Checkpoint,
    fingerprint: str,
    factory: TransportFactory,
    settings: WeightsSettings | None = None,
) -> Checkpoint:
    """Open a model that must have this fingerprint, and ask the Hub for nothing if a peer of the swarm can
    give its manifest, or did before.

    Args:
        factory: makes a transport to the swarm, which is closed again. Not called if there is no need.

    Raises:
        UsageError, ModelError: as `Checkpoint.open`.
    """
    store = BlockStore()
    if is_fingerprint(fingerprint) and _is_on_the_hub(model) and find_manifest(store, fingerprint) is None:

        async def ask_peers() -> None:
            transport = await factory(identity_for(factory), acceptable_now)
            try:
                if await fetch_manifest(transport, store, fingerprint, settings) is None:
                    logger.warning("no peer hands out the manifest of %s; the Hub is asked", fingerprint)
            finally:
                await transport.close()

        with portal.lease() as lease:
            lease.call(ask_peers)
    return Checkpoint.open(model, fingerprint=fingerprint)


def _is_on_the_hub(model: str | os.PathLike[str] | Checkpoint) -> bool:
    from swarmkit.models.checkpoint.open_files import is_hub_name

    return not isinstance(model, Checkpoint) and is_hub_name(os.fspath(model))
