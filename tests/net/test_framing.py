"""Cutting frames out of bytes, however those arrive."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.errors import PeerUnreachableError, ProtocolError
from swarmkit.net.hivemind.framing import FrameStream
from swarmkit.net.transport.seam import MAX_FRAME_BYTES

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(30)]


async def over(end: socket.socket, *, greeting: bool = False) -> FrameStream:
    stream = FrameStream(greeting=greeting)
    end.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: stream, sock=end)
    return stream


@pytest.fixture
async def wire() -> AsyncIterator[tuple[FrameStream, socket.socket]]:
    """A stream, and the raw other end of its socket."""
    here, there = socket.socketpair()
    there.setblocking(False)
    stream = await over(here)
    yield stream, there
    stream.close()
    there.close()


class FakeTransport(asyncio.Transport):
    """Takes what a stream does to its socket."""

    paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def abort(self) -> None:
        pass


@given(frames=st.lists(st.binary(max_size=50), max_size=10), cuts=st.lists(st.integers(1, 60), max_size=20))
async def test_frames_are_whole_wherever_the_bytes_were_cut(frames: list[bytes], cuts: list[int]) -> None:
    stream = FrameStream()
    stream.connection_made(FakeTransport())
    data = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)
    for cut in [*cuts, len(data) or 1]:
        stream.data_received(data[:cut])
        data = data[cut:]
    assert [await stream.receive() for _ in frames] == frames


@given(greeting=st.binary(max_size=300), frame=st.binary(max_size=50), cut=st.integers(0, 360))
async def test_a_greeting_comes_before_the_frames(greeting: bytes, frame: bytes, cut: int) -> None:
    here, there = socket.socketpair()
    sender, receiver = await over(here), await over(there, greeting=True)
    sender.write_greeting(greeting)
    await sender.send(frame)
    got = await receiver.greeting(), await receiver.receive()
    sender.close()
    receiver.close()
    assert got == (greeting, frame)


async def test_a_greeting_without_end_is_refused() -> None:
    stream = FrameStream(greeting=True)
    stream.connection_made(FakeTransport())
    stream.data_received(b"\xff" * 10)
    with pytest.raises(ProtocolError):
        await stream.greeting()


async def test_a_frame_of_the_greatest_size_is_allowed(wire: tuple[FrameStream, socket.socket]) -> None:
    stream, _ = wire
    stream.data_received(MAX_FRAME_BYTES.to_bytes(4, "big"))
    stream.data_received(bytes(MAX_FRAME_BYTES))
    assert len(await stream.receive()) == MAX_FRAME_BYTES


async def test_a_length_above_the_limit_is_refused_before_its_bytes_come(
    wire: tuple[FrameStream, socket.socket],
) -> None:
    stream, there = wire
    there.send((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ProtocolError):
        await stream.receive()


async def test_frames_before_a_refused_one_are_delivered(wire: tuple[FrameStream, socket.socket]) -> None:
    stream, there = wire
    there.send(b"\0\0\0\2ok\xff\xff\xff\xff")
    assert await stream.receive() == b"ok"


async def test_a_flood_of_empty_frames_is_not_read_without_end() -> None:
    stream, transport = FrameStream(), FakeTransport()
    stream.connection_made(transport)
    stream.data_received(bytes(4 * 10_000))
    assert transport.paused


async def test_reading_goes_on_once_frames_were_taken() -> None:
    stream, transport = FrameStream(), FakeTransport()
    stream.connection_made(transport)
    stream.data_received(bytes(4 * 10_000))
    for _ in range(10_000):
        await stream.receive()
    assert not transport.paused


async def test_of_a_frame_that_nobody_waits_for_only_a_part_is_read() -> None:
    stream, transport = FrameStream(), FakeTransport()
    stream.connection_made(transport)
    stream.data_received((2**20).to_bytes(4, "big") + bytes(300 * 1024))
    assert transport.paused


async def test_the_rest_of_it_is_read_when_somebody_does() -> None:
    stream, transport = FrameStream(), FakeTransport()
    stream.connection_made(transport)
    frame = bytes(range(256)) * 4096
    data = len(frame).to_bytes(4, "big") + frame
    stream.data_received(data[: 300 * 1024])
    receiving = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    assert not transport.paused
    for start in range(300 * 1024, len(data), 10_001):
        stream.data_received(data[start : start + 10_001])
    assert await receiving == frame


async def test_an_end_in_the_middle_of_a_frame_is_an_end(wire: tuple[FrameStream, socket.socket]) -> None:
    stream, there = wire
    there.send(b"\0\0\0\x09abc")
    there.close()
    with pytest.raises(PeerUnreachableError):
        await stream.receive()


async def test_a_sender_waits_until_the_other_side_reads(wire: tuple[FrameStream, socket.socket]) -> None:
    stream, there = wire
    sending = asyncio.create_task(stream.send(bytes(2_000_000)))
    await asyncio.sleep(0)
    assert not sending.done()
    received = 0
    while received < 2_000_004:
        received += len(await asyncio.get_running_loop().sock_recv(there, 1 << 20))
    await sending


async def test_a_waiting_sender_learns_of_the_end(wire: tuple[FrameStream, socket.socket]) -> None:
    stream, there = wire
    sending = asyncio.create_task(stream.send(bytes(2_000_000)))
    await asyncio.sleep(0)
    there.close()
    with pytest.raises(PeerUnreachableError):
        await sending


async def test_a_stream_whose_last_bytes_left_after_its_peers_end_can_be_ended(
    wire: tuple[FrameStream, socket.socket],
) -> None:
    """Then asyncio's transport has gone, and knows nothing any more."""
    stream, there = wire
    sending = asyncio.create_task(stream.send(bytes(1024 * 1024)))
    await asyncio.sleep(0)
    there.shutdown(socket.SHUT_WR)
    loop, taken = asyncio.get_running_loop(), 0
    while part := await loop.sock_recv(there, 2**16):
        taken += len(part)
    assert taken == 4 + 1024 * 1024
    stream.abort(PeerUnreachableError("ended", "peer"))
    with pytest.raises(PeerUnreachableError):
        await sending
