"""A server that knows the fingerprint starts from its peers, without the Hub."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from swarmkit.errors import ModelError, PeerUnreachableError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_pinned import PinnedFiles, find_manifest
from swarmkit.net import portal
from swarmkit.net.protocol.weights_messages import WEIGHTS
from swarmkit.net.registry import offers
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.transport.identity import Identity
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import RecordCheck, Transport
from swarmkit.node.server import Server
from swarmkit.server.weights.manifest import fetch_manifest, open_with_fingerprint
from swarmkit.server.weights.service import WeightsService, WeightsSettings
from swarmkit.server.weights.share import SharedWeights
from swarmkit.server.weights.transfer import look_up
from tests.models.hub import LocalHub

from ..waiting import eventually
from .test_weights_fetch import Town, folder, hub, is_right, town

__all__ = ["folder", "hub", "town"]


async def joining(town: Town, name: str, fingerprint: str) -> tuple[Checkpoint, SharedWeights]:
    """A server that was given the fingerprint; peers are its only source."""
    town.monkeypatch.setenv("SWARMKIT_STORE_DIR", str(town.home / name))
    transport = town.network.transport()
    town.transports.append(transport)
    await fetch_manifest(transport, BlockStore(), fingerprint)
    checkpoint = Checkpoint.open("some/llama", fingerprint=fingerprint, progress=False)
    return checkpoint, SharedWeights(transport, checkpoint, WeightsSettings(source="peers"))


async def offering_bytes(
    town: Town, fingerprint: str, encoded: bytes, size: int | None = None
) -> WeightsService:
    """A peer that offers these bytes (or says that it has `size` of them) as the manifest."""
    transport = town.network.transport()
    town.transports.append(transport)
    service = WeightsService(WeightsSettings())
    content = hashlib.sha256(encoded).hexdigest()
    path = town.home / f"offered-{len(town.transports)}"
    path.write_bytes(encoded)
    service.offer(content, path)
    await transport.listen(WEIGHTS.endpoint, service.serve)
    expires_at = town.network.clock() + 60
    offer = WeightsOffer(
        peer_id=transport.peer_id,
        fingerprint=fingerprint,
        block=None,
        content=content,
        size=len(encoded) if size is None else size,
        addresses=(),
        expires_at=expires_at,
    )
    value = offers.sign(offer, transport.identity)
    await transport.store([(key, value) for key in offers.keys_of(offer)], expires_at)
    return service


async def test_a_second_server_starts_without_a_single_request_to_the_hub(town: Town, folder: Path) -> None:
    await town.offering("first", 0, 4)
    full = town.full_manifest().full_fingerprint
    requests = len(town.hub.requests)

    checkpoint, second = await joining(town, "second", full)
    report = await second.fetch(0, 3)

    assert report.from_peers == [0, 1, 2]
    assert is_right(checkpoint, folder, 0, 3)
    assert len(town.hub.requests) == requests


async def test_a_server_that_started_from_peers_is_one_for_the_next(town: Town, folder: Path) -> None:
    first = await town.offering("first", 0, 4)
    full = town.full_manifest().full_fingerprint
    checkpoint, second = await joining(town, "second", full)
    await second.fetch(0, 1)
    requests = len(town.hub.requests)
    await town.share(second, 0, 1)
    await first.transport.close()

    checkpoint, third = await joining(town, "third", full)

    assert (await third.fetch(0, 1)).from_peers == [0]
    assert is_right(checkpoint, folder, 0, 1)
    assert len(town.hub.requests) == requests


async def test_who_is_given_the_full_fingerprint_meets_who_was_not(town: Town) -> None:
    first = await town.offering("first", 0, 4)
    checkpoint, _ = await joining(town, "second", town.full_manifest().full_fingerprint)
    assert checkpoint.fingerprint == first.checkpoint.fingerprint
    assert checkpoint.manifest.full_fingerprint == town.full_manifest().full_fingerprint


async def test_a_manifest_in_the_store_needs_nobody(town: Town) -> None:
    first = await town.offering("first", 0, 1)
    fingerprint = first.checkpoint.fingerprint
    await joining(town, "second", fingerprint)

    async def nobody(identity: Identity, check: RecordCheck) -> Transport:
        raise AssertionError("there was no need to ask anybody")

    checkpoint = open_with_fingerprint("some/llama", fingerprint, nobody)
    assert isinstance(checkpoint.files, PinnedFiles)


async def test_the_manifest_of_another_model_is_refused(town: Town) -> None:
    first = await town.offering("first", 0, 1)
    real = first.checkpoint.manifest
    lie = Manifest({**real.config, "rope_theta": 1.0}, real.files, real.weights, real.commit)
    _, second = town.server("second")
    for _ in range(3):
        await offering_bytes(town, real.fingerprint, lie.encoded)
    await first.transport.close()
    assert await fetch_manifest(second.transport, BlockStore(), real.fingerprint) is None
    assert find_manifest(BlockStore(), real.fingerprint) is None


async def test_among_liars_an_honest_peer_is_found(town: Town) -> None:
    first = await town.offering("first", 0, 1)
    fingerprint = first.checkpoint.fingerprint
    _, second = town.server("second")
    for encoded in (b"nonsense", b"{}", b"x" * 100_000):
        await offering_bytes(town, fingerprint, encoded)
    manifest = await fetch_manifest(second.transport, BlockStore(), fingerprint)
    assert manifest is not None
    assert manifest.fingerprint == fingerprint


@pytest.mark.parametrize(("size", "asked"), [(MAX_MANIFEST_BYTES, True), (MAX_MANIFEST_BYTES + 1, False)])
async def test_a_manifest_that_is_too_large_is_not_asked_for(
    town: Town, size: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second = town.server("second")
    await offering_bytes(town, "ab" * 16, b"{}", size)
    dialled: list[str] = []

    async def open_nothing(peer_id: str, *arguments: object) -> None:
        dialled.append(peer_id)
        raise PeerUnreachableError("not today", peer_id)

    monkeypatch.setattr(second.transport, "open", open_nothing)
    assert await fetch_manifest(second.transport, BlockStore(), "ab" * 16) is None
    assert bool(dialled) is asked


async def test_nothing_is_left_of_a_transfer(town: Town) -> None:
    _, second = town.server("second")
    await offering_bytes(town, "ab" * 16, b"nonsense")
    await fetch_manifest(second.transport, BlockStore(), "ab" * 16)
    assert list((BlockStore().root / "partial").glob("*")) == []


async def test_blocks_that_came_with_a_token_are_not_handed_on(town: Town) -> None:
    """A manifest says that somebody found the model public; what the Hub gave us, the Hub must say so of."""
    first = await town.offering("first", 0, 1)
    checkpoint, second = await joining(town, "second", first.checkpoint.fingerprint)
    await asyncio.to_thread(checkpoint.fetch, 1, 2)  # from the Hub
    town.hub.gated = {"some/llama"}
    await second.run(0, 2)  # returns at once
    key = offers.claim_key(checkpoint.fingerprint, 1)
    assert await second.transport.fetch([key]) == {}


class Place:
    """A network in this process, for servers with threads of their own."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()

    async def __call__(self, identity: Identity, check: RecordCheck) -> Transport:
        return self.network.transport(identity, check)

    def wait_until_offered(self, fingerprint: str) -> None:
        async def wait() -> None:
            transport = await self(Identity(), acceptable_now)

            async def offered() -> bool:
                found = await look_up(transport, fingerprint, [None, 0, 1], self.network.clock())
                return len(found) == 3

            try:
                await eventually(offered, "the server offers its manifest and two blocks")
            finally:
                await transport.close()

        with portal.lease() as lease:
            lease.call(wait)


def test_a_server_with_the_fingerprint_serves_without_the_hub(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place()
    checkpoint = Checkpoint.open("some/llama", progress=False)
    full = checkpoint.make_full_manifest().full_fingerprint
    with Server(checkpoint, transport=place, blocks=(0, 2)):
        place.wait_until_offered(checkpoint.fingerprint)
        monkeypatch.setenv("SWARMKIT_STORE_DIR", str(tmp_path / "second"))
        asked = len(hub.requests)
        pinned = {"fingerprint": full, "weights": WeightsSettings(source="peers")}
        with Server("some/llama", transport=place, blocks=(0, 2), **pinned) as second:
            assert second.blocks == (0, 2)
    assert len(hub.requests) == asked


def test_the_hub_is_asked_where_no_peer_has_the_manifest(
    hub: LocalHub, caplog: pytest.LogCaptureFixture
) -> None:
    create = Place()
    right = Checkpoint.open("some/llama", progress=False).fingerprint
    assert open_with_fingerprint("some/llama", right, create).fingerprint == right
    with pytest.raises(ModelError, match="has the fingerprint"):
        open_with_fingerprint("some/llama", "0" * 32, create)
    assert "no peer hands out the manifest" in caplog.text
