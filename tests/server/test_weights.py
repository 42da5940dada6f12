"""Handing out block files: politely, and only what was offered."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from swarmkit.errors import RemoteError
from swarmkit.net.protocol.weights_messages import WEIGHTS, FileChunk, FileFound, GetFile
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.endpoints import connect, listen
from swarmkit.net.rpc.message_stream import CHUNK_BYTES
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.rates import TokenBucket
from swarmkit.net.transport.seam import Transport
from swarmkit.server.weights.service import MAX_PAUSE_S, WeightsService, WeightsSettings

from ..takers import Target, a_transfer, take
from ..waiting import eventually


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(per_second=100, burst=50, clock=clock)
    assert bucket.take(50) == 0
    assert bucket.take(25) == 0.25
    assert bucket.take(25) == 0.5
    clock.now = 10
    assert bucket.take(50) == 0
    assert bucket.take(1) == pytest.approx(0.01)


class House:
    """A holder of one file, and somebody who wants it."""

    def __init__(self, folder: Path, size: int, **settings: Any) -> None:
        self.clock = Clock()
        self.content = random.Random(0).randbytes(size)
        self.hash = hashlib.sha256(self.content).hexdigest()
        self.path = folder / "file"
        self.path.write_bytes(self.content)
        self.network = MemoryNetwork()
        self.holder, self.asker = self.network.transport(), self.network.transport()
        self.service = WeightsService(WeightsSettings(**settings), clock=self.clock, sleep=self.clock.sleep)
        self.service.offer(self.hash, self.path)

    async def stream(self, asker: Transport | None = None) -> ClientStream:
        """A new stream from the asker to the holder."""
        await listen(self.holder, WEIGHTS, self.service.serve)
        return await connect(asker or self.asker, WEIGHTS, self.holder.peer_id, max_payload_bytes=CHUNK_BYTES)

    async def ask(self, offset: int = 0, asker: Transport | None = None) -> ClientStream:
        """The same, on which the file was asked for and found."""
        stream = await self.stream(asker)
        assert await stream.ask(GetFile(self.hash, offset), FileFound) == FileFound(len(self.content))
        return stream

    async def close(self) -> None:
        await self.asker.close()
        await self.holder.close()


async def chunks(stream: ClientStream, nbytes: int) -> bytes:
    """The next chunks, until there are so many bytes."""
    data = b""
    while len(data) < nbytes:
        incoming = await stream.answer(FileChunk)
        data += incoming.raw(incoming.message.data)
    return data


async def refused(stream: ClientStream, message: GetFile) -> str:
    """The code of the fault that answers a request."""
    with pytest.raises(RemoteError) as caught:
        await stream.ask(message, FileFound)
    return caught.value.code


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path, 3 * CHUNK_BYTES + 5, upload_bytes_per_s=CHUNK_BYTES, max_transfers=1)
    yield house
    await house.close()


async def test_a_file_is_handed_out_whole_at_the_agreed_rate(house: House) -> None:
    assert await chunks(await house.ask(), len(house.content)) == house.content
    assert house.clock.now == pytest.approx(1, abs=0.01)  # two chunks at once, the third after a second


async def test_a_file_is_handed_out_from_where_the_asker_stopped(house: House) -> None:
    assert await chunks(await house.ask(offset=3 * CHUNK_BYTES), 5) == house.content[-5:]


async def test_nothing_is_sent_while_a_session_waits_except_that_it_never_stands_still(house: House) -> None:
    house.service.busy = lambda: True
    assert await chunks(await house.ask(), len(house.content)) == house.content
    assert house.clock.now >= 4 * MAX_PAUSE_S


async def test_a_file_that_is_not_offered_is_refused(house: House) -> None:
    assert await refused(await house.stream(), GetFile("0" * 64)) == "not_held"


@pytest.mark.parametrize("content", ["../", "0" * 63, "0" * 64 + "\n", "A" * 64])
async def test_what_is_no_hash_is_refused(house: House, content: str) -> None:
    assert await refused(await house.stream(), GetFile(content)) == "bad_message"


async def test_an_offset_beyond_the_file_is_refused(house: House) -> None:
    assert await refused(await house.stream(), GetFile(house.hash, len(house.content) + 1)) == "not_held"


async def test_more_transfers_than_allowed_are_refused_while_they_last(house: House) -> None:
    first = await house.ask()
    assert await refused(await house.stream(), GetFile(house.hash)) == "busy"
    await chunks(first, len(house.content))
    assert await chunks(await house.ask(), len(house.content)) == house.content


async def test_a_stranger_with_all_transfers_gives_way_to_a_peer_that_has_none(tmp_path: Path) -> None:
    house = House(tmp_path, 8 * CHUNK_BYTES, max_transfers=2)
    stranger = house.network.transport()
    first, second = [await house.ask(asker=stranger) for _ in range(2)]
    assert await chunks(await house.ask(), len(house.content)) == house.content
    assert await chunks(first, len(house.content)) == house.content
    with pytest.raises(RemoteError) as caught:
        await chunks(second, len(house.content))
    assert (caught.value.code, caught.value.retry_after_s > 0) == ("busy", True)
    await stranger.close()
    await house.close()


async def test_a_peer_gets_a_file_though_a_stranger_has_all_streams(
    tmp_path: Path,
) -> None:
    house = House(tmp_path, 5, max_transfers=2)
    await listen(house.holder, WEIGHTS, house.service.serve)
    stranger = house.network.transport()
    target = Target(stranger, house.holder.peer_id, "", 0, 1, 1, files=[house.hash])
    flood = asyncio.create_task(take(target, a_transfer, 100))
    await eventually(lambda: house.service.sent_bytes > 100 * 5, "the stranger is busy")
    assert await chunks(await house.ask(), 5) == house.content
    flood.cancel()
    await asyncio.wait([flood])
    await stranger.close()
    await house.close()


async def test_a_file_that_became_shorter_meanwhile_is_said_to_be_gone(house: House) -> None:
    stream = await house.ask()
    house.path.write_bytes(house.content[:CHUNK_BYTES])
    with pytest.raises(RemoteError, match="became shorter"):
        await chunks(stream, len(house.content))
