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
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.models.checkpoint.store_hub import HubFiles
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

    def server(
        self, name: str, token: str | None = None, **settings: Any
    ) -> tuple[Checkpoint, SharedWeights]:
        self.monkeypatch.setenv("SWARMKIT_STORE_DIR", str(self.home / name))
        checkpoint = Checkpoint.open("some/llama", progress=False, token=token)
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
        """A peer that claims another content for block 0, and serves it or something else."""
        checkpoint = Checkpoint.open("some/llama", progress=False)
        tensors = {key: value.clone() for key, value in checkpoint.read(checkpoint.block_keys(0, 1)).items()}
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
    sent = town.hub_weights()
    checkpoint, second = town.server("second", source="peers")
    report = await second.fetch(0, 3)
    assert report.from_peers == [0, 1, 2]
    assert is_right(checkpoint, folder, 0, 3)
    assert town.hub_weights() == sent


async def test_a_sample_of_what_peers_send_is_compared_with_the_hub(town: Town, folder: Path) -> None:
    await town.offering("first", 0, 1)
    sent = town.hub_weights()
    checkpoint, second = town.server("second", samples=3)
    assert (await second.fetch(0, 1)).from_peers == [0]
    assert is_right(checkpoint, folder, 0, 1)
    assert 0 < town.hub_weights() - sent <= 3 * 4096 + 6000  # samples and headers


async def test_blocks_come_from_peers_and_hub_as_it_happens(town: Town, folder: Path) -> None:
    await town.offering("first", 1, 2)
    checkpoint, second = town.server("second")
    told: list[tuple[int, int]] = []
    report = await second.fetch(0, 3, lambda done, total: told.append((done, total)))
    assert (report.from_peers, report.from_hub) == ([1], [0, 2])
    assert is_right(checkpoint, folder, 0, 3)
    assert told[-1][0] == told[-1][1] > 0


async def test_what_was_fetched_from_a_peer_is_offered_in_turn(town: Town) -> None:
    first = await town.offering("first", 0, 1)
    second = await town.offering("second", 0, 1)
    await first.transport.close()
    _, third = town.server("third", source="peers")
    assert (await third.fetch(0, 1)).from_peers == [0]
    assert second.service.sent_bytes > 0


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
    checkpoint, second = town.server("second")
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
    checkpoint, second = town.server("second")
    files = checkpoint.files
    assert isinstance(files, HubFiles)
    peers = PeerWeights(second.transport, checkpoint, files, WeightsSettings())
    part = checkpoint.block_parts(0, 1)[0]
    for _ in range(2):
        offered = await peers._look_up([0])
        assert not await peers._fetch_block(0, part, offered.get(0, []), FetchReport())
    assert asked == 1
    assert peers.liars == {liar.peer_id}


async def test_well_hashed_lies_are_found_by_the_sample(town: Town, folder: Path) -> None:
    for name in ("liar", "friend"):
        await town.liar(name, None, change=0.9)
    await town.offering("honest", 0, 1)
    checkpoint, second = town.server("second")
    report = await second.fetch(0, 1)
    assert report.from_peers == [0]  # from the honest one, after the others were found out
    assert is_right(checkpoint, folder, 0, 1)


async def test_without_the_hub_the_most_claimed_content_is_taken(town: Town, folder: Path) -> None:
    await town.liar("liar", None)
    await town.offering("one", 0, 1)
    await town.offering("two", 0, 1)
    checkpoint, third = town.server("third", source="peers")
    assert (await third.fetch(0, 1)).from_peers == [0]
    assert is_right(checkpoint, folder, 0, 1)


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
    truth = honest.service._files[content].read_bytes()

    async def half(stream: Stream) -> None:
        messages = MessageStream(stream, WEIGHTS)
        await messages.receive()
        await messages.send(FileFound(len(truth)))
        await send_chunk(messages, truth[:10_000])

    lazy = town.network.transport(record_check=acceptable_now)
    town.transports.append(lazy)
    await lazy.listen(WEIGHTS.endpoint, half)
    await town.claim(lazy, honest.checkpoint.fingerprint, content, len(truth))
    checkpoint, second = town.server("second", source="peers")

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
    monkeypatch.setattr("swarmkit.server.weights.transfer._SLOWEST_BYTES_PER_S", 1e9)

    async def trickle(stream: MessageStream, truth: bytes) -> None:
        await stream.receive()
        await stream.send(FileFound(len(truth)))
        for byte in truth:
            await send_chunk(stream, bytes([byte]))
            await asyncio.sleep(0.001)

    await town.liar("slow", trickle)
    checkpoint, second = town.server("second", idle_timeout_s=0.1)
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
    _, alone = town.server("alone", source="peers")
    with pytest.raises(ModelError, match=r"No peer could give blocks \[0, 1\].*SWARMKIT_WEIGHTS_SOURCE=any"):
        await alone.fetch(0, 2)


async def test_offline_blocks_come_from_peers_unsampled(
    town: Town, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await town.offering("first", 0, 1)
    checkpoint, second = town.server("second")
    _ = checkpoint.fingerprint
    unplug(monkeypatch)
    assert (await second.fetch(0, 1)).from_peers == [0]
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
