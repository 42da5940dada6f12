"""Messages over a stream: pieces, sizes, limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import torch

from swarmkit.errors import (
    MessageTooLargeError,
    PeerUnreachableError,
    ProtocolError,
    UsageError,
)
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import SESSION, GetInfo, Opened, Step, StepDone
from swarmkit.net.rpc.message_stream import CHUNK_BYTES, MessageStream
from swarmkit.net.transport.memory import MemoryNetwork, MemoryStream
from swarmkit.net.transport.seam import MAX_FRAME_BYTES, Buffer

LIMIT = 8 * 1024 * 1024
MiB = 1024 * 1024


class Recorder(MemoryStream):
    """A stream that notes the size of every frame sent."""

    sizes: list[int]

    async def send(self, *parts: Buffer) -> None:
        self.sizes.append(sum(memoryview(part).nbytes for part in parts))
        await super().send(*parts)


@pytest.fixture
async def ends() -> AsyncIterator[tuple[MessageStream, MessageStream]]:
    one, other = Recorder.pair(MemoryNetwork(), "one", "other")
    for end in (one, other):
        end.sizes = []  # type: ignore[attr-defined]
    yield MessageStream(one, SESSION, LIMIT, 0.2), MessageStream(other, SESSION, LIMIT, 0.2)
    one.close()
    other.close()


def message_of(*tensors: torch.Tensor) -> tuple[Step, list[memoryview]]:
    """A step that carries up to three tensors."""
    specs, payload = zip(*map(codec.encode, tensors), strict=True)
    return Step(0, specs[0], 1, *specs[1:]), list(payload)


def bytes_tensor(size: int) -> torch.Tensor:
    return (torch.arange(size) % 251).to(torch.uint8)


async def passed(ends: Sequence[MessageStream], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a message after they went from one end to the other."""
    message, payload = message_of(*tensors)
    sending = asyncio.create_task(ends[0].send(message, payload))
    received = await ends[1].receive()
    await sending
    step = received.message
    assert isinstance(step, Step)
    return [received.tensor(spec) for spec in (step.hidden, step.mask, step.positions) if spec is not None]


# there and back


async def test_a_message_without_tensors_is_one_frame(ends: tuple[MessageStream, MessageStream]) -> None:
    await ends[0].send(GetInfo())
    assert (await ends[1].receive()).message == GetInfo()


async def test_both_ends_may_speak(ends: tuple[MessageStream, MessageStream]) -> None:
    await ends[0].send(GetInfo())
    await ends[1].send(Opened(1))
    assert (await ends[0].receive()).message == Opened(1)


async def test_tensors_arrive_with_their_message(ends: tuple[MessageStream, MessageStream]) -> None:
    tensors = [torch.randn(2, 3, 4), torch.ones(2, 5, dtype=torch.uint8), torch.arange(6).reshape(2, 3)]
    assert all(map(torch.equal, await passed(ends, *tensors), tensors))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 4 * MiB, 4 * MiB + 1, LIMIT])
@pytest.mark.parametrize("direction", [1, -1])
async def test_payloads_of_any_size_pass_both_ways(
    ends: tuple[MessageStream, MessageStream], size: int, direction: int
) -> None:
    tensor = bytes_tensor(size)
    assert torch.equal((await passed(ends[::direction], tensor))[0], tensor)


async def test_tensors_of_several_frames_do_not_mix(ends: tuple[MessageStream, MessageStream]) -> None:
    tensors = [bytes_tensor(CHUNK_BYTES + 1), bytes_tensor(3), bytes_tensor(2 * CHUNK_BYTES)]
    assert all(map(torch.equal, await passed(ends, *tensors), tensors))


async def test_a_small_message_is_one_frame(ends: tuple[MessageStream, MessageStream]) -> None:
    await passed(ends, bytes_tensor(CHUNK_BYTES))
    assert len(ends[0].stream.sizes) == 1  # type: ignore[attr-defined]


async def test_no_frame_is_larger_than_a_transport_takes(ends: tuple[MessageStream, MessageStream]) -> None:
    await passed(ends, bytes_tensor(LIMIT))
    assert max(ends[0].stream.sizes) <= MAX_FRAME_BYTES  # type: ignore[attr-defined]


async def test_messages_follow_each_other(ends: tuple[MessageStream, MessageStream]) -> None:
    for number in range(3):
        await ends[0].send(Opened(number))
    assert [(await ends[1].receive()).message for _ in range(3)] == [Opened(0), Opened(1), Opened(2)]


async def test_a_tensor_is_asked_for_by_the_messages_own_spec(
    ends: tuple[MessageStream, MessageStream],
) -> None:
    message, payload = message_of(torch.ones(1))
    await ends[0].send(message, payload)
    received = await ends[1].receive()
    with pytest.raises(UsageError, match="not one of this message's own"):
        received.tensor(TensorSpec((1,), "float32"))


async def test_a_payload_that_is_not_what_the_message_says_is_the_senders_mistake(
    ends: tuple[MessageStream, MessageStream],
) -> None:
    with pytest.raises(UsageError, match="announces 4 bytes of tensors but comes with 3"):
        await ends[0].send(StepDone(TensorSpec((1,), "float32"), 0.0, 0.0), [b"123"])


# limits


async def test_a_message_over_the_limit_is_refused_by_its_head(
    ends: tuple[MessageStream, MessageStream],
) -> None:
    ends[1].max_payload_bytes = 3
    message, payload = message_of(torch.ones(1))
    await ends[0].send(message, payload)
    with pytest.raises(MessageTooLargeError, match="4 bytes of tensors are more than the 3 allowed"):
        await ends[1].receive()


async def test_a_message_at_the_limit_is_taken(ends: tuple[MessageStream, MessageStream]) -> None:
    ends[1].max_payload_bytes = 4
    assert torch.equal((await passed(ends, torch.ones(1)))[0], torch.ones(1))


async def test_the_rest_of_a_message_is_waited_for_as_long_as_allowed(
    ends: tuple[MessageStream, MessageStream],
) -> None:
    message, payload = message_of(bytes_tensor(2 * CHUNK_BYTES))
    sending = asyncio.create_task(ends[0].send(message, payload))
    ends[1].stream.receive = _only(2, ends[1].stream)  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match=f"only {CHUNK_BYTES} of {2 * CHUNK_BYTES} bytes.*within 0.2 s"):
        await ends[1].receive()
    sending.cancel()


async def test_a_stream_that_ends_within_a_message_has_ended(
    ends: tuple[MessageStream, MessageStream],
) -> None:
    message, payload = message_of(bytes_tensor(4 * CHUNK_BYTES))
    sending = asyncio.create_task(ends[0].send(message, payload))
    await asyncio.sleep(0)
    ends[0].close()
    with pytest.raises(PeerUnreachableError):
        await ends[1].receive()
    await asyncio.gather(sending, return_exceptions=True)


def _only(frames: int, stream: MemoryStream):  # type: ignore[no-untyped-def]
    """A `receive` after whose first frames nothing comes."""
    receive, left = stream.receive, frames

    async def limited() -> bytes:
        nonlocal left
        if not left:
            await asyncio.Event().wait()
        left -= 1
        return await receive()

    return limited


# being looked at before they are taken


async def test_a_message_is_seen_before_its_payload_comes(ends: tuple[MessageStream, MessageStream]) -> None:
    message, payload = message_of(bytes_tensor(2 * CHUNK_BYTES))
    sending = asyncio.create_task(ends[0].send(message, payload))
    ends[1].stream.receive = _only(1, ends[1].stream)  # type: ignore[method-assign]
    incoming = await ends[1].next()
    assert (incoming.message, ends[1].in_message) == (message, True)
    sending.cancel()


@pytest.mark.parametrize("size", [4, CHUNK_BYTES, 3 * CHUNK_BYTES])
async def test_after_a_message_whose_payload_was_not_taken_the_next_one_is_read(
    ends: tuple[MessageStream, MessageStream], size: int
) -> None:
    message, payload = message_of(bytes_tensor(size))

    async def send() -> None:
        await ends[0].send(message, payload)
        await ends[0].send(GetInfo())

    sending = asyncio.create_task(send())
    await ends[1].next()
    assert (await ends[1].next()).message == GetInfo()
    await sending


async def test_the_rest_of_a_dropped_message_is_not_waited_for_for_ever(
    ends: tuple[MessageStream, MessageStream],
) -> None:
    message, payload = message_of(bytes_tensor(2 * CHUNK_BYTES))
    sending = asyncio.create_task(ends[0].send(message, payload))
    ends[1].stream.receive = _only(1, ends[1].stream)  # type: ignore[method-assign]
    await ends[1].next()
    with pytest.raises(ProtocolError, match="only 0 of"):
        await ends[1].next()
    sending.cancel()


async def test_a_reader_that_was_cancelled_within_a_payload_can_go_on_with_the_next_message(
    ends: tuple[MessageStream, MessageStream],
) -> None:
    message, payload = message_of(bytes_tensor(2 * CHUNK_BYTES))

    async def send() -> None:
        await ends[0].stream.send(*first)
        await go_on.wait()
        for frame in rest:
            await ends[0].stream.send(frame)
        await ends[0].send(GetInfo())

    frames = await frames_of(message, payload)
    first, rest, go_on = [frames[0]], frames[1:], asyncio.Event()
    sending = asyncio.create_task(send())
    incoming = await ends[1].next()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(incoming.payload(), 0.05)
    go_on.set()
    assert (await ends[1].next()).message == GetInfo()
    await sending


async def frames_of(message: Step, payload: list[memoryview]) -> list[bytes]:
    """The frames in which a message travels."""
    one, other = MemoryStream.pair(MemoryNetwork(), "one", "other")
    sending = asyncio.create_task(MessageStream(one, SESSION).send(message, payload))
    frames = [await other.receive() for _ in range(1 + -(-payload[0].nbytes // CHUNK_BYTES))]
    await sending
    return frames
