"""Blocks from peers and the Hub, mixed, without believing anybody."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.checkpoint.manifest import Manifest
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_hub import HubFiles
from swarmkit.models.checkpoint.store_pinned import keep_manifest
from swarmkit.models.checkpoint.store_tensors import keep_tensors
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.weights_messages import WEIGHTS, FileChunk, FileFound
from swarmkit.net.registry import offers
from swarmkit.net.registry.acceptance import acceptable_now
from swarmkit.net.registry.offers import WeightsOffer
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import Stream, Transport
from swarmkit.server.weights.fetch import FetchReport, PeerWeights
from swarmkit.server.weights.service import WeightsSettings
from swarmkit.server.weights.share import SharedWeights

from ..models.hub import TOKEN, LocalHub, local_hub, unplug, use_hub
from ..models.tiny import make_checkpoint
from ..waiting import eventually


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("weights"), "llama", num_blocks=4, shards=2, hidden_size=64
    )


class Town:
    """A hub, a network, and servers with a store each."""

    def __init__(self, hub: LocalHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hub = hub
        self.network = MemoryNetwork()
        self.transports: list[Transport] = []
        self.home = home
        self.monkeypatch = monkeypatch
        self._tasks: list[asyncio.Task[None]] = []
        self._manifest: Manifest | None = None

    def full_manifest(self) -> Manifest:
        """The model's manifest with the hash of each block, made on a machine of its own."""
        if self._manifest is None:
            with self.monkeypatch.context() as patch:
                patch.setenv("SWARMKIT_STORE_DIR", str(self.home / "founder"))
                self._manifest = Checkpoint.open("some/llama", progress=False).make_full_manifest()
        return self._manifest

    def server(
        self, name: str, token: str | None = None, full: bool = False, **settings: Any
    ) -> tuple[Checkpoint, SharedWeights]:
        """Args: full: it was given the fingerprint that covers hashes of blocks."""
        self.monkeypatch.setenv("SWARMKIT_STORE_DIR", str(self.home / name))
        fingerprint = None
        if full:
            fingerprint = self.full_manifest().full_fingerprint
            keep_manifest(BlockStore(), self.full_manifest())
        checkpoint = Checkpoint.open("some/llama", progress=False, token=token, fingerprint=fingerprint)
        transport = self.network.transport(record_check=acceptable_now)
        self.transports.append(transport)
        return checkpoint, SharedWeights(transport, checkpoint, WeightsSettings(**settings))

    async def offering(self, name: str, start: int, stop: int, **options: Any) -> SharedWeights:
        """A server that has blocks of the Hub and offers them."""
        _, weights = self.server(name, **options)
        await weights.fetch(start, stop)
        await self.share(weights, start, stop)
        return weights

    async def share(self, weights: SharedWeights, start: int, stop: int) -> None:
        """Let a server offer its blocks; returns when it has."""
        self._tasks.append(asyncio.create_task(weights.run(start, stop)))
        key = offers.claim_key(weights.checkpoint.fingerprint, start)

        async def offered() -> bool:
            return weights.transport.peer_id in (await weights.transport.fetch([key])).get(key, {})

        await eventually(offered, "the server offers its blocks")

    async def liar(
        self, name: str, serve: Callable[[MessageStream, bytes], Awaitable[None]] | None, change: float = 1.0
    ) -> Transport:
        """A peer that claims to have block 0.

        Args:
            serve: what it sends of the block's right hash; without, it claims the hash of a block in which
                it changed a share of the values, and sends that.
            change: this share.
        """
        checkpoint = Checkpoint.open("some/llama", progress=False)
        tensors = {key: value.clone() for key, value in checkpoint.read(checkpoint.block_keys(0, 1)).items()}
        if serve is None:
            for value in tensors.values():
                value.view(-1)[: max(1, int(value.numel() * change))] += 1
        store = BlockStore(self.home / name)
        keep_tensors(store, "lies@1", "block 0", tensors)
        path = store.find("lies@1", "block 0")
        assert path is not None
        transport = self.network.transport(record_check=acceptable_now)
        self.transports.append(transport)
        weights = SharedWeights(transport, checkpoint, WeightsSettings())
        weights.service.offer(path.stem, path)

        async def lying(stream: Stream) -> None:
            assert serve is not None
            await serve(MessageStream(stream, WEIGHTS), path.read_bytes())

        await transport.listen(WEIGHTS.endpoint, weights.service.serve if serve is None else lying)
        await self.claim(transport, checkpoint.fingerprint, path.stem, path.stat().st_size)
        return transport

    async def claim(self, transport: Transport, fingerprint: str, content: str, size: int) -> None:
        expires_at = self.network.clock() + 60
        offer = WeightsOffer(
            peer_id=transport.peer_id,
            fingerprint=fingerprint,
            block=0,
            content=content,
            size=size,
            addresses=(),
            expires_at=expires_at,
        )
        value = offers.sign(offer, transport.identity)
        await transport.store([(key, value) for key in offers.keys_of(offer)], expires_at)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self.transports:
            await transport.close()

    def hub_weights(self) -> int:
        return self.hub.sent(".safetensors")


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **kwargs: str(tmp_path / "cache"))
    with local_hub({"some/llama": folder}) as hub:
        use_hub(hub, tmp_path / "home", monkeypatch)
        yield hub


@pytest_asyncio.fixture
async def town(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Town]:
    town = Town(hub, tmp_path, monkeypatch)
    yield town
    await town.close()


def is_right(checkpoint: Checkpoint, folder: Path, start: int, stop: int) -> bool:
    whole = {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}
    read = checkpoint.read(checkpoint.block_keys(start, stop))
    return bool(read) and all(torch.equal(value, whole[key]) for key, value in read.items())


async def test_a_second_server_starts_without_weights_from_the_hub(town: Town, folder: Path) -> None:
    await town.offering("first", 0, 3)
    checkpoint, second = town.server("second", full=True)
    sent = town.hub_weights()
    report = await second.fetch(0, 3)
    assert report.from_peers == [0, 1, 2]
    assert is_right(checkpoint, folder, 0, 3)
    assert town.hub_weights() == sent


async def test_blocks_come_from_peers_and_hub_as_it_happens(town: Town, folder: Path) -> None:
    await town.offering("first", 1, 2)
    checkpoint, second = town.server("second", full=True)
    told: list[tuple[int, int]] = []
    report = await second.fetch(0, 3, lambda done, total: told.append((done, total)))
    assert (report.from_peers, report.from_hub) == ([1], [0, 2])
    assert is_right(checkpoint, folder, 0, 3)
    assert told[-1][0] == told[-1][1] > 0


async def test_what_was_fetched_from_a_peer_is_offered_in_turn(town: Town) -> None:
    first = await town.offering("first", 0, 1)
    second = await town.offering("second", 0, 1, full=True)
    await first.transport.close()
    _, third = town.server("third", source="peers", full=True)
    assert (await third.fetch(0, 1)).from_peers == [0]
    assert second.service.sent_bytes > 0


async def test_without_hashes_of_blocks_none_comes_from_a_peer(town: Town, folder: Path) -> None:
    await town.offering("first", 0, 1)
    checkpoint, second = town.server("second")
    assert (await second.fetch(0, 1)).from_hub == [0]
    assert is_right(checkpoint, folder, 0, 1)


async def test_an_old_manifest_says_what_it_lacks(town: Town) -> None:
    await town.offering("first", 0, 1)
    _, second = town.server("second", source="peers")
    with pytest.raises(
        ModelError, match=r"does not cover hashes of blocks.*`swarmkit fingerprint some/llama`"
    ):
        await second.fetch(0, 1)


async def test_a_block_that_the_hub_sent_before_comes_from_a_peer_once_evicted(
    town: Town, folder: Path
) -> None:
    await town.offering("first", 0, 1)
    checkpoint, second = town.server("second")
    await second.fetch(0, 1)
    content = checkpoint.block_content(0)
    assert content is not None
    BlockStore().blob(content).unlink()
    assert (await second.fetch(0, 1)).from_peers == [0]
    assert is_right(checkpoint, folder, 0, 1)


async def test_what_a_former_version_took_on_a_peers_word_is_fetched_again(town: Town, folder: Path) -> None:
    checkpoint, server = town.server("server")
    files = checkpoint.files
    assert isinstance(files, HubFiles)
    tensors = {key: value + 1 for key, value in load_file(next(folder.glob("*1-of*.safetensors"))).items()}
    keep_tensors(files.store, "lies@1", "block 0", {key: tensors[key] for key in checkpoint.block_keys(0, 1)})
    lie = files.store.entry("lies@1", "block 0")
    assert lie is not None
    files.store.link(files.source, "block 0", lie.content, "peers")
    assert checkpoint.block_content(0) is None  # so it is not offered either
    assert (await server.fetch(0, 1)).from_hub == [0]
    assert is_right(checkpoint, folder, 0, 1)


async def send_chunk(stream: MessageStream, data: bytes) -> None:
    await stream.send(FileChunk(TensorSpec((len(data),), "uint8")), [data])


async def garbage(stream: MessageStream, truth: bytes) -> None:
    await stream.receive()
    await stream.send(FileFound(len(truth)))
    await send_chunk(stream, bytes(len(truth)))


async def too_much(stream: MessageStream, truth: bytes) -> None:
    await stream.receive()
    await stream.send(FileFound(len(truth)))
    await send_chunk(stream, truth + b"!")


async def another_size(stream: MessageStream, truth: bytes) -> None:
    await stream.receive()
    await stream.send(FileFound(2**50))


async def nonsense(stream: MessageStream, truth: bytes) -> None:
    await stream.receive()
    await stream.stream.send(b"\xc1 nonsense")


@pytest.mark.parametrize("lie", [garbage, too_much, another_size, nonsense])
async def test_a_liars_bytes_are_refused_and_the_hub_helps(
    town: Town, folder: Path, lie: Callable[[MessageStream, bytes], Awaitable[None]]
) -> None:
    await town.liar("liar", lie)
    checkpoint, second = town.server("second", full=True)
    report = await second.fetch(0, 1)
    assert (report.from_peers, report.from_hub) == ([], [0])
    assert is_right(checkpoint, folder, 0, 1)
    assert not list((checkpoint.files.store.root / "partial").glob("*.part"))  # type: ignore[attr-defined]


async def test_a_liar_is_not_asked_again(town: Town, folder: Path) -> None:
    asked = 0

    async def lie(stream: MessageStream, truth: bytes) -> None:
        nonlocal asked
        asked += 1
        await garbage(stream, truth)

    liar = await town.liar("liar", lie)
    checkpoint, second = town.server("second", full=True)
    files = checkpoint.files
    assert isinstance(files, HubFiles)
    peers = PeerWeights(second.transport, checkpoint, files, WeightsSettings(source="peers"))
    for _ in range(2):
        with pytest.raises(ModelError, match="No peer could give"):
            await peers.fetch(0, 1)
    assert asked == 1
    assert peers.liars == {liar.peer_id}


SHARES = pytest.mark.parametrize("change", [0.9, 0.01, 0.0], ids=["most", "1 %", "one value"])


@SHARES
async def test_a_changed_block_under_its_own_hash_is_refused_however_many_claim_it(
    town: Town, folder: Path, change: float, caplog: pytest.LogCaptureFixture
) -> None:
    liars = [await town.liar(name, None, change) for name in ("liar", "friend")]
    await town.offering("honest", 0, 1)
    checkpoint, second = town.server("second", full=True)
    assert (await second.fetch(0, 1)).from_peers == [0]
    assert is_right(checkpoint, folder, 0, 1)
    (refusal,) = [record.message for record in caplog.records if "is refused" in record.message]
    assert "block 0 of some/llama" in refusal
    assert all(liar.peer_id in refusal for liar in liars)


@SHARES
async def test_a_changed_block_under_the_right_hash_is_refused_and_not_offered_on(
    town: Town, change: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def altered(stream: MessageStream, truth: bytes) -> None:
        many = max(1, int(len(truth) * change))
        await stream.receive()
        await stream.send(FileFound(len(truth)))
        await send_chunk(stream, truth[:-many] + bytes(byte ^ 1 for byte in truth[-many:]))

    liar = await town.liar("liar", altered)
    _, second = town.server("second", source="peers", full=True)
    with pytest.raises(ModelError, match="No peer could give"):
        await second.fetch(0, 1)
    assert f"block 0 from peer {liar.peer_id} is refused" in caplog.text
    assert await second.offer(0, 1) == 0
    assert not list((BlockStore().root / "blobs").glob("*"))


async def test_what_the_hub_sends_is_doubted_if_no_peer_has_it(town: Town, folder: Path) -> None:
    await town.offering("first", 0, 1)
    checkpoint, second = town.server("second", source="hub")
    town.hub.spoil = 1
    assert (await second.fetch(0, 1)).from_hub == [0]
    assert town.hub.spoil == 0
    assert is_right(checkpoint, folder, 0, 1)


async def test_what_the_hub_sends_twice_is_taken_whatever_a_liar_claims(town: Town, folder: Path) -> None:
    await town.liar("liar", None)
    checkpoint, second = town.server("second", source="hub")
    sent = town.hub_weights()
    assert (await second.fetch(0, 1)).from_hub == [0]
    once = sum(tensor.nbytes for tensor in checkpoint.read(checkpoint.block_keys(0, 1)).values())
    assert 2 * once <= town.hub_weights() - sent <= 2.1 * once + 6000
    assert is_right(checkpoint, folder, 0, 1)


async def test_what_is_claimed_by_an_honest_peer_is_fetched_once(town: Town, folder: Path) -> None:
    await town.liar("liar", None)
    await town.offering("honest", 0, 1)
    checkpoint, second = town.server("second", source="hub")
    sent = town.hub_weights()
    await second.fetch(0, 1)
    once = sum(tensor.nbytes for tensor in checkpoint.read(checkpoint.block_keys(0, 1)).values())
    assert once <= town.hub_weights() - sent <= 1.1 * once + 6000


async def test_a_broken_transfer_is_taken_up_with_another_holder(town: Town, folder: Path) -> None:
    honest = await town.offering("honest", 0, 1)
    content = honest.checkpoint.block_content(0)
    assert content is not None
    truth = BlockStore(town.home / "honest").blob(content).read_bytes()

    async def half(stream: Stream) -> None:
        messages = MessageStream(stream, WEIGHTS)
        await messages.receive()
        await messages.send(FileFound(len(truth)))
        await send_chunk(messages, truth[:10_000])

    lazy = town.network.transport(record_check=acceptable_now)
    town.transports.append(lazy)
    await lazy.listen(WEIGHTS.endpoint, half)
    await town.claim(lazy, honest.checkpoint.fingerprint, content, len(truth))
    checkpoint, second = town.server("second", source="peers", full=True)

    class LazyFirst(random.Random):
        def shuffle(self, x: Any) -> None:
            x.sort(key=lambda offer: offer.peer_id != lazy.peer_id)

    files = checkpoint.files
    assert isinstance(files, HubFiles)
    peers = PeerWeights(second.transport, checkpoint, files, second.settings, chance=LazyFirst())
    report = await peers.fetch(0, 1)
    assert report.peer_bytes == len(truth)
    assert honest.service.sent_bytes == len(truth) - 10_000
    assert is_right(checkpoint, folder, 0, 1)


async def test_a_holder_that_trickles_is_left(
    town: Town, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmkit.server.weights.transfer.SLOWEST_BYTES_PER_S", 1e9)

    async def trickle(stream: MessageStream, truth: bytes) -> None:
        await stream.receive()
        await stream.send(FileFound(len(truth)))
        for byte in truth:
            await send_chunk(stream, bytes([byte]))
            await asyncio.sleep(0.001)

    await town.liar("slow", trickle)
    checkpoint, second = town.server("second", idle_timeout_s=0.1, full=True)
    assert (await second.fetch(0, 1)).from_hub == [0]
    assert is_right(checkpoint, folder, 0, 1)


async def test_weights_in_the_hubs_cache_are_fetched_from_nobody(town: Town, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    await town.offering("first", 0, 1)
    checkpoint, second = town.server("second")
    for shard in set(checkpoint.weight_map.values()):
        hf_hub_download("some/llama", shard, revision=checkpoint.files.commit)  # type: ignore[attr-defined]
    assert await second.fetch(0, 1) == FetchReport()
    assert is_right(checkpoint, folder, 0, 1)


async def test_without_a_holder_and_without_the_hub_the_error_says_what_to_do(town: Town) -> None:
    _, alone = town.server("alone", source="peers", full=True)
    with pytest.raises(ModelError, match=r"No peer could give blocks \[0, 1\].*SWARMKIT_WEIGHTS_SOURCE=any"):
        await alone.fetch(0, 2)


async def test_offline_blocks_come_from_peers(
    town: Town, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await town.offering("first", 0, 1)
    checkpoint, second = town.server("second", full=True)
    _ = checkpoint.fingerprint
    unplug(monkeypatch)
    assert (await second.fetch(0, 1)).from_peers == [0]
    assert is_right(checkpoint, folder, 0, 1)


async def test_a_file_that_changed_after_it_was_offered_is_not_handed_out(
    town: Town, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = await town.offering("first", 0, 1)
    content = first.checkpoint.block_content(0)
    assert content is not None
    path = BlockStore(town.home / "first").blob(content)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    checkpoint, second = town.server("second", full=True)
    assert (await second.fetch(0, 1)).from_hub == [0]
    assert first.service.sent_bytes == 0
    assert "has changed since it was verified" in caplog.text
    await first.offer(0, 1)  # which finds it damaged, and puts it aside
    assert first.checkpoint.block_content(0) is None
    assert is_right(checkpoint, folder, 0, 1)


async def test_sharing_begins_and_ends_with_its_block(town: Town) -> None:
    _, first = town.server("first")
    await first.fetch(0, 1)
    before = asyncio.all_tasks()
    async with first.sharing(0, 1):
        assert len(asyncio.all_tasks()) == len(before) + 1
    assert asyncio.all_tasks() == before


async def test_a_fetch_that_is_cancelled_stops_and_goes_on_later(town: Town, folder: Path) -> None:
    checkpoint, server = town.server("server")
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    fetching = asyncio.create_task(
        server.fetch(0, 4, lambda done, total: loop.call_soon_threadsafe(began.set))
    )
    await began.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await server.fetch(0, 4)
    assert is_right(checkpoint, folder, 0, 4)


async def test_gated_weights_are_not_handed_out(town: Town) -> None:
    town.hub.gated = {"some/llama"}
    _, first = town.server("first", token=TOKEN)
    await first.fetch(0, 1)
    await first.run(0, 1)  # returns at once
    assert await first.transport.fetch([offers.claim_key(first.checkpoint.fingerprint, 0)]) == {}


async def test_a_folder_is_neither_fetched_nor_handed_out(folder: Path) -> None:
    transport = MemoryNetwork().transport()
    weights = SharedWeights(transport, Checkpoint.open(folder), WeightsSettings())
    assert await weights.fetch(0, 4) == FetchReport()
    await weights.run(0, 4)
    await transport.close()
