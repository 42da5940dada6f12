"""Rates of a peer: what passes at once, what waits, and changes while a stream is open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import anyio
import pytest

from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.paced import PacedTransport
from swarmkit.net.transport.rates import PeerRates, Rates
from swarmkit.net.transport.seam import Stream

FRAME = bytes(100_000)


class Naps:
    """A clock that moves by what is slept."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def naps() -> Naps:
    return Naps()


@pytest.fixture
def rates(naps: Naps) -> Rates:
    return Rates(lambda: naps.now, naps.sleep)


@pytest.fixture
async def ends(rates: Rates) -> AsyncIterator[tuple[Stream, Stream]]:
    """Both ends of a stream: the paced peer's, which serves it, and another peer's."""
    network = MemoryNetwork()
    here, there = network.transport(), network.transport()
    served: asyncio.Queue[Stream] = asyncio.Queue()

    async def serve(stream: Stream) -> None:
        await served.put(stream)
        await asyncio.Event().wait()

    await PacedTransport(here, rates).listen("talk", serve)
    other = await there.open(here.peer_id, "talk", here.addresses)
    yield await served.get(), other
    await here.close()
    await there.close()


async def test_without_limits_nothing_waits(ends: tuple[Stream, Stream], naps: Naps) -> None:
    paced, other = ends
    await paced.send(FRAME)
    await other.send(FRAME)
    assert (await other.receive(), await paced.receive(), naps.slept) == (FRAME, FRAME, [])


async def test_what_is_sent_keeps_to_the_upload_rate(
    ends: tuple[Stream, Stream], naps: Naps, rates: Rates
) -> None:
    paced, other = ends
    rates.replace(50_000, None)
    for _ in range(5):
        await paced.send(FRAME[:40_000], FRAME[40_000:])
        await other.receive()
    assert naps.now == pytest.approx((5 * len(FRAME) - 16 * 1024) / 50_000)  # all but the burst


async def test_what_is_received_keeps_to_the_download_rate(
    ends: tuple[Stream, Stream], naps: Naps, rates: Rates
) -> None:
    paced, other = ends
    rates.replace(None, 50_000)
    await other.send(FRAME)
    assert await paced.receive() == FRAME
    assert naps.now == pytest.approx((len(FRAME) - 16 * 1024) / 50_000)


async def test_what_goes_through_is_counted_with_a_limit_and_without(
    ends: tuple[Stream, Stream], rates: Rates
) -> None:
    paced, other = ends
    await paced.send(FRAME)
    rates.replace(1e9, 1e9)
    await paced.send(FRAME[:10])
    await other.send(FRAME[:1])
    await paced.receive()
    assert (rates.traffic.sent_bytes, rates.traffic.received_bytes) == (len(FRAME) + 10, 1)


async def test_a_limit_that_is_lifted_holds_for_no_further_frame(
    ends: tuple[Stream, Stream], naps: Naps, rates: Rates
) -> None:
    paced, other = ends
    rates.replace(1.0, 1.0)
    rates.replace(None, None)
    await paced.send(FRAME)
    await other.receive()
    assert naps.slept == []


async def test_streams_in_both_directions_of_dialling_share_the_rate(
    ends: tuple[Stream, Stream], naps: Naps, rates: Rates
) -> None:
    network = MemoryNetwork()
    dialler, served = network.transport(), network.transport()
    await served.listen("talk", lambda stream: anyio.sleep_forever())
    dialled = await PacedTransport(dialler, rates).open(served.peer_id, "talk", served.addresses)
    rates.replace(50_000, None)
    await dialled.send(FRAME)
    await ends[0].send(FRAME)
    assert naps.now == pytest.approx((2 * len(FRAME) - 16 * 1024) / 50_000)
    await dialler.close()
    await served.close()


# one rate for each of many peers


def test_a_peer_that_takes_much_has_no_other_one_wait() -> None:
    each = PeerRates(per_second=10, burst=5, clock=lambda: 0.0)
    assert [each.take("stranger", 1) for _ in range(7)] == [0, 0, 0, 0, 0, 0.1, 0.2]
    assert each.take("client", 1) == 0


def test_a_peer_that_has_waited_may_go_on() -> None:
    naps = Naps()
    each = PeerRates(per_second=10, burst=5, clock=lambda: naps.now)
    each.take("peer", 15)
    naps.now += 1.1
    assert each.take("peer", 1) == 0


def test_of_many_peers_those_are_remembered_that_took_something_last() -> None:
    each = PeerRates(per_second=10, burst=1, clock=lambda: 0.0)
    each.take("first", 10)
    for number in range(10_000):
        each.take(str(number), 10)
    assert len(each) <= 4096
    assert each.take("9999", 0) > 0
    assert each.take("first", 0) == 0
