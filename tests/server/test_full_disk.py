"""The disk of a server's store fills up: the right message, nothing lost, and what can go on goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_pinned import find_manifest, keep_manifest
from swarmkit.server.weights.share import SharedWeights

from ..disks import SmallDisk, small_disk
from .test_weights_fetch import Town, folder, hub, is_right, town

__all__ = ["folder", "hub", "town"]

SAYS = r"the store at .* cannot be written to \(.*No space left.*Make room"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """For the store of the server "small", which takes more for itself than there is."""
    monkeypatch.setenv("SWARMKIT_STORE_MAX_BYTES", "1GB")
    with small_disk(tmp_path / "small", 4 * 1024**2) as disk:
        yield disk


async def small(town: Town, **settings: object) -> tuple[Checkpoint, SharedWeights]:
    """A server with a store on the small disk, which has block 0 already."""
    checkpoint, server = town.server("small", **settings)  # type: ignore[arg-type]
    await server.fetch(0, 1)
    return checkpoint, server


async def test_a_fetch_from_the_hub_goes_on_once_there_is_room(
    town: Town, folder: Path, disk: SmallDisk
) -> None:
    checkpoint, server = await small(town)
    with pytest.raises(ModelError, match=SAYS):
        await server.fetch(0, 4, lambda done, total: disk.fill())
    disk.clear()
    assert (await server.fetch(0, 4)).from_hub == [1, 2, 3]
    assert is_right(checkpoint, folder, 0, 4)


async def test_a_fetch_from_a_peer_goes_on_once_there_is_room(
    town: Town, folder: Path, disk: SmallDisk
) -> None:
    await town.offering("first", 0, 4)
    checkpoint, server = await small(town, full=True, source="peers")
    disk.fill()
    with pytest.raises(ModelError, match=SAYS):
        await server.fetch(0, 4)
    disk.clear()
    assert (await server.fetch(0, 4)).from_peers == [1, 2, 3]
    assert is_right(checkpoint, folder, 0, 4)


async def test_what_is_in_the_store_is_read_and_handed_out_from_a_full_disk(
    town: Town, folder: Path, disk: SmallDisk
) -> None:
    _, server = await small(town)
    await server.offer(0, 1)
    disk.fill()
    await town.share(server, 0, 1)
    again = Checkpoint.open("some/llama", progress=False)
    assert is_right(again, folder, 0, 1)
    checkpoint, other = town.server("other", full=True, source="peers")
    assert (await other.fetch(0, 1)).from_peers == [0]
    assert is_right(checkpoint, folder, 0, 1)


async def test_a_fingerprint_that_cannot_be_kept_is_told_and_made_again(town: Town, disk: SmallDisk) -> None:
    checkpoint, server = await small(town)
    await server.fetch(0, 4)
    manifest = checkpoint.make_full_manifest()
    disk.fill()
    with pytest.raises(ModelError, match=r"cannot be written to \(manifest.json: No space"):
        keep_manifest(BlockStore(), manifest)
    assert find_manifest(BlockStore(), manifest.full_fingerprint) is None
    disk.clear()
    keep_manifest(BlockStore(), checkpoint.make_full_manifest())
    kept = find_manifest(BlockStore(), manifest.full_fingerprint)
    assert kept is not None
    assert kept.blocks == manifest.blocks


async def test_nothing_half_written_is_left_on_a_full_disk(town: Town, disk: SmallDisk) -> None:
    _, server = await small(town)
    before = sorted(path for path in disk.path.rglob("*") if "blobs" in path.parts or "index" in path.parts)
    disk.fill()
    with pytest.raises(ModelError):
        await server.fetch(0, 4)
    disk.clear()
    after = sorted(path for path in disk.path.rglob("*") if "blobs" in path.parts or "index" in path.parts)
    assert after == before


async def test_two_servers_on_one_store_and_a_file_damaged_under_them(
    town: Town, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, first = town.server("shared")
    await first.fetch(0, 1)
    content = first.checkpoint.block_content(0)
    assert content is not None
    path = BlockStore().blob(content)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    second, server = town.server("shared")
    assert (await server.fetch(0, 1)).from_hub == [0]  # the second start finds the damage
    assert "is damaged; it is put aside" in caplog.text
    assert is_right(second, folder, 0, 1)
    assert is_right(first.checkpoint, folder, 0, 1)
    assert second.block_content(0) == content
