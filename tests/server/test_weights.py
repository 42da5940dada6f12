"""Handing out block files: politely, and only what was offered."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from swarmkit.errors import PeerUnreachableError
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.rates import TokenBucket
from swarmkit.net.transport.seam import Stream
from swarmkit.server.weights.service import (
    CHUNK_BYTES,
    MAX_PAUSE_S,
    WEIGHTS_ENDPOINT,
    Ask,
    Refused,
    Sending,
    WeightsService,
    WeightsSettings,
    encode,
    read_answer,
)


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

    async def ask(self, frame: bytes | None = None, offset: int = 0) -> Stream:
        await self.holder.listen(WEIGHTS_ENDPOINT, self.service.serve)
        stream = await self.asker.open(self.holder.peer_id, WEIGHTS_ENDPOINT)
        await stream.send(frame if frame is not None else encode(Ask(self.hash, offset)))
        return stream

    async def close(self) -> None:
        await self.asker.close()
        await self.holder.close()


async def rest(stream: Stream) -> bytes:
    """Everything until the other side ends the stream."""
    data = b""
    with suppress(PeerUnreachableError):
        while True:
            data += await stream.receive()
    return data


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path, 3 * CHUNK_BYTES + 5, upload_bytes_per_s=CHUNK_BYTES, max_transfers=1)
    yield house
    await house.close()


async def test_a_file_is_handed_out_whole_at_the_agreed_rate(house: House) -> None:
    stream = await house.ask()
    assert read_answer(await stream.receive(), "") == Sending(len(house.content))
    assert await rest(stream) == house.content
    assert house.clock.now == pytest.approx(1, abs=0.01)  # two chunks at once, the third after a second


async def test_a_file_is_handed_out_from_where_the_asker_stopped(house: House) -> None:
    stream = await house.ask(offset=3 * CHUNK_BYTES)
    assert read_answer(await stream.receive(), "") == Sending(len(house.content))
    assert await rest(stream) == house.content[-5:]


async def test_nothing_is_sent_while_a_session_waits_except_that_it_never_stands_still(house: House) -> None:
    house.service.busy = lambda: True
    stream = await house.ask()
    await stream.receive()
    assert await rest(stream) == house.content
    assert house.clock.now >= 4 * MAX_PAUSE_S


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (encode(Ask("0" * 64)), "not_held"),
        (b"what?", "bad_message"),
        (b"x" * 5000, "bad_message"),
        (b"\x83\xa4type\xa3Ask\xa7content\xa3../\xa6offset\x00", "bad_message"),
    ],
)
async def test_what_is_not_offered_is_refused(house: House, frame: bytes, code: str) -> None:
    answer = read_answer(await (await house.ask(frame)).receive(), "")
    assert isinstance(answer, Refused)
    assert answer.code == code


async def test_an_offset_beyond_the_file_is_refused(house: House) -> None:
    answer = read_answer(await (await house.ask(offset=len(house.content) + 1)).receive(), "")
    assert isinstance(answer, Refused)


async def test_more_transfers_than_allowed_are_refused(house: House) -> None:
    first = await house.ask()
    await first.receive()
    answer = read_answer(await (await house.ask()).receive(), "")
    assert isinstance(answer, Refused)
    assert answer.code == "busy"
    await rest(first)
    assert isinstance(read_answer(await (await house.ask()).receive(), ""), Sending)
