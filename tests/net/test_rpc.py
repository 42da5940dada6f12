"""Protocols, and both sides of a stream: what is legal, what is answered, what becomes of faults."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec
import pytest
import torch

from swarmkit.errors import (
    NotServedError,
    PeerTimeoutError,
    PeerUnreachableError,
    ProtocolError,
    RemoteError,
    UsageError,
)
from swarmkit.net.protocol import codec
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import Fault
from swarmkit.net.protocol.protocol import PROTOCOL_VERSION, Protocol, VersionRange
from swarmkit.net.rpc import endpoints
from swarmkit.net.rpc.client_stream import ClientStream
from swarmkit.net.rpc.endpoints import connect, listen
from swarmkit.net.rpc.faults import Refusal
from swarmkit.net.rpc.message_stream import CHUNK_BYTES, HEAD, IncomingMessage, MessageStream
from swarmkit.net.rpc.server_stream import LINGER_BYTES, ServerStream
from swarmkit.net.transport.memory import MemoryNetwork, MemoryTransport
from swarmkit.net.transport.seam import Stream

MiB = 1024 * 1024


class Greet(msgspec.Struct, frozen=True, tag=True):
    """The first message."""


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The answer to it."""


class Double(msgspec.Struct, frozen=True, tag=True):
    """A request with a tensor."""

    values: TensorSpec
    number: int = 0


class Doubled(msgspec.Struct, frozen=True, tag=True):
    """The answer to it."""

    values: TensorSpec


TALK = Protocol(
    "talk",
    Greet | Welcome | Double | Doubled | Fault,
    legal={"strange": {Greet: "known"}, "known": {Double: "known", Greet: "known"}},
    first="strange",
)

Answer = Callable[[ServerStream, IncomingMessage], Awaitable[None]]


async def answer_kindly(stream: ServerStream, incoming: IncomingMessage) -> None:
    message = incoming.message
    if isinstance(message, Greet):
        await stream.send(Welcome())
        return
    stream.number = message.number
    await incoming.payload()
    spec, data = codec.encode(2 * incoming.tensor(message.values))
    await stream.send(Doubled(spec), [data])


@dataclass
class ServerAndClient:
    """A server and a client of an in-memory network, and the server's sides of its streams."""

    network: MemoryNetwork
    server: MemoryTransport
    client: MemoryTransport
    streams: list[ServerStream]
    answer: Answer = answer_kindly
    refusal: Refusal | None = None
    max_payload_bytes: int = 64 * MiB
    message_timeout: float = 5.0
    served: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether a stream was given to the service."""

    async def serve(self, stream: Stream) -> None:
        server_stream = ServerStream(
            stream, TALK, max_payload_bytes=self.max_payload_bytes, message_timeout=self.message_timeout
        )
        self.streams.append(server_stream)
        asyncio.get_running_loop().call_soon(self.served.set)
        await server_stream.serve(lambda incoming: self.answer(server_stream, incoming), self.refusal)

    async def stream(self, **options: Any) -> ClientStream:
        """A new stream to the server."""
        return await connect(self.client, TALK, self.server.peer_id, max_payload_bytes=64 * MiB, **options)

    async def known(self) -> ClientStream:
        """The same, in the state `known`."""
        stream = await self.stream()
        await stream.ask(Greet(), Welcome)
        return stream


@pytest.fixture
async def world() -> AsyncIterator[ServerAndClient]:
    network = MemoryNetwork()
    world = ServerAndClient(network, network.transport(), network.transport(), [])
    await listen(world.server, TALK, world.serve)
    yield world
    await world.client.close()
    await world.server.close()


async def doubled(stream: ClientStream, tensor: torch.Tensor, **fields: Any) -> torch.Tensor:
    spec, data = codec.encode(tensor)
    await stream.send(Double(spec, **fields), [data])
    incoming = await stream.answer(Doubled)
    return incoming.tensor(incoming.message.values)


async def remote_error(answer: Awaitable[object]) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await answer
    return caught.value


# a protocol


async def test_a_message_that_is_answered_leads_to_the_next_state(world: ServerAndClient) -> None:
    await world.known()
    assert world.streams[0].state == "known"


def test_an_illegal_message_is_refused_with_the_names_of_legal_ones() -> None:
    error = str(TALK.illegal("known", Welcome()))
    assert re.search("may not send Welcome in state 'known'.*Double, Greet", error), error


def test_an_endpoint_has_the_same_name_in_every_version() -> None:
    assert TALK.endpoint == "swarmkit/talk"


# requests and answers


async def test_a_request_is_answered(world: ServerAndClient) -> None:
    assert await (await world.stream()).ask(Greet(), Welcome) == Welcome()


async def test_a_request_with_a_tensor_is_answered_with_one(world: ServerAndClient) -> None:
    assert torch.equal(await doubled(await world.known(), torch.ones(2, 3)), torch.full((2, 3), 2.0))


async def test_an_answer_of_another_type_is_the_servers_mistake(world: ServerAndClient) -> None:
    with pytest.raises(ProtocolError, match="expected Doubled as an answer, got Welcome"):
        await (await world.stream()).ask(Greet(), Doubled)


async def test_a_message_out_of_turn_is_a_fault_and_ends_the_stream(world: ServerAndClient) -> None:
    stream = await world.stream()
    error = await remote_error(doubled(stream, torch.ones(1)))
    assert (error.code, "Double in state 'strange'" in str(error)) == ("illegal_message", True)
    with pytest.raises(PeerUnreachableError):
        await stream.receive()


async def test_a_refused_request_does_not_advance_the_state(world: ServerAndClient) -> None:
    async def refuse(stream: ServerStream, incoming: IncomingMessage) -> None:
        raise Refusal("busy", "come back later", 1.5)

    world.answer = refuse
    stream = await world.stream()
    error = await remote_error(stream.ask(Greet(), Welcome))
    assert (error.code, error.retry_after_s, world.streams[0].state) == ("busy", 1.5, "strange")


async def test_after_a_refusal_the_stream_goes_on(world: ServerAndClient) -> None:
    async def refuse(stream: ServerStream, incoming: IncomingMessage) -> None:
        world.answer = answer_kindly
        raise Refusal("busy", "come back later")

    world.answer = refuse
    stream = await world.stream()
    await remote_error(stream.ask(Greet(), Welcome))
    assert await stream.ask(Greet(), Welcome) == Welcome()


async def test_an_answer_is_cancelled_when_the_peer_that_asked_is_gone(
    world: ServerAndClient,
) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def think(stream: ServerStream, incoming: IncomingMessage) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    world.answer = think
    stream = await world.stream()
    await stream.send(Greet())
    with anyio.fail_after(10):
        await begun.wait()
        stream.close()
        await cancelled.wait()


async def test_a_dismissed_peer_is_told_why(world: ServerAndClient) -> None:
    async def dismiss(stream: ServerStream, incoming: IncomingMessage) -> None:
        stream.dismiss(Refusal("busy", "your room was needed"))
        await asyncio.Event().wait()

    world.answer = dismiss
    error = await remote_error((await world.stream()).ask(Greet(), Welcome))
    assert (error.code, "your room was needed" in str(error)) == ("busy", True)


async def test_the_fault_of_a_refused_request_has_its_number(world: ServerAndClient) -> None:
    async def refuse(stream: ServerStream, incoming: IncomingMessage) -> None:
        stream.number = incoming.message.number
        raise Refusal("busy", "come back later")

    stream = await world.known()
    world.answer = refuse
    spec, data = codec.encode(torch.ones(1))
    await stream.send(Double(spec, 7), [data])
    assert (await stream.receive()).message == Fault("busy", "come back later", 7)


async def test_a_failure_of_the_server_is_told_and_ends_the_stream(world: ServerAndClient) -> None:
    async def fail(stream: ServerStream, incoming: IncomingMessage) -> None:
        raise ZeroDivisionError("oh")

    world.answer = fail
    stream = await world.stream()
    error = await remote_error(stream.ask(Greet(), Welcome))
    assert (error.code, "ZeroDivisionError: oh" in str(error)) == ("internal", True)
    with pytest.raises(PeerUnreachableError):
        await stream.receive()


async def test_a_server_that_takes_no_more_streams_says_so(world: ServerAndClient) -> None:
    world.refusal = Refusal("busy", "too many streams")
    stream = await world.stream()
    assert (await remote_error(stream.ask(Greet(), Welcome))).is_busy


async def test_why_a_stream_ended_is_told_to_a_client_that_goes_on_sending(world: ServerAndClient) -> None:
    world.refusal = Refusal("busy", "too many streams")
    stream = await world.stream()
    await asyncio.wait_for(world.served.wait(), 5)
    world.streams[0].close()
    assert "too many streams" in str(await remote_error(stream.send(Greet())))


async def test_a_refused_client_that_goes_on_sending_is_soon_read_from_no_more(
    world: ServerAndClient,
) -> None:
    world.refusal = Refusal("busy", "too many streams")
    stream = await world.stream()
    sent = 0

    async def go_on() -> None:
        nonlocal sent
        while True:
            await stream.stream.send(bytes(MiB))
            sent += MiB

    with pytest.raises(PeerUnreachableError):
        await asyncio.wait_for(go_on(), 60)
    assert sent <= LINGER_BYTES + 4 * MiB  # some of it is under way


# payloads


async def test_a_payload_is_received_into_a_given_buffer_without_a_further_copy(
    world: ServerAndClient,
) -> None:
    stream = await world.known()
    sent = torch.arange(MiB, dtype=torch.float32)
    spec, data = codec.encode(sent)
    asked = asyncio.create_task(stream.send(Double(spec), [data]))
    buffer = torch.zeros(MiB)
    incoming = await stream.next()
    await incoming.payload(memoryview(buffer.numpy()))
    await asked
    assert torch.equal(buffer, 2 * sent)
    assert incoming.tensor(incoming.message.values).data_ptr() == buffer.data_ptr()


async def test_a_buffer_of_another_size_is_the_callers_mistake(world: ServerAndClient) -> None:
    stream = await world.known()
    spec, data = codec.encode(torch.ones(4))
    await stream.send(Double(spec), [data])
    with pytest.raises(UsageError, match="16 bytes does not fit a buffer of 3"):
        await (await stream.next()).payload(bytearray(3))


@pytest.mark.parametrize("values", [1, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 1, MiB])
async def test_a_payload_that_is_not_taken_is_dropped_before_the_next_message(
    world: ServerAndClient, values: int
) -> None:
    async def drop(stream: ServerStream, incoming: IncomingMessage) -> None:
        raise Refusal("busy", "no room for so much")

    stream = await world.known()
    world.answer = drop
    assert (await remote_error(doubled(stream, torch.ones(values)))).is_busy
    world.answer = answer_kindly
    assert torch.equal(await doubled(stream, torch.ones(1)), torch.full((1,), 2.0))


async def test_tensors_are_not_there_before_they_were_received(world: ServerAndClient) -> None:
    found: list[IncomingMessage] = []

    async def look(stream: ServerStream, incoming: IncomingMessage) -> None:
        found.append(incoming)
        incoming.tensor(incoming.message.values)

    stream = await world.known()
    world.answer = look
    error = await remote_error(doubled(stream, torch.ones(MiB)))
    assert "await payload() first" in str(error)


async def test_a_message_over_the_limit_is_refused_by_its_head(world: ServerAndClient) -> None:
    world.max_payload_bytes = 3
    error = await remote_error(doubled(await world.known(), torch.ones(1)))
    assert (error.code, "4 bytes of tensors are more than the 3" in str(error)) == ("too_large", True)


# time


async def test_a_server_that_is_silent_beyond_the_deadline_is_given_up(world: ServerAndClient) -> None:
    async def be_silent(stream: ServerStream, incoming: IncomingMessage) -> None:
        await asyncio.Event().wait()

    world.answer = be_silent
    stream = await world.stream()
    with pytest.raises(PeerTimeoutError, match=r"silent for 0\.1 s"), stream.within(0.1):
        await stream.ask(Greet(), Welcome)


async def test_a_deadline_holds_for_all_that_is_done_within_it(world: ServerAndClient) -> None:
    stream = await world.stream()

    async def greet_very_often() -> None:
        with stream.within(0.1):
            for _ in range(1_000_000):
                await stream.ask(Greet(), Welcome)
                await asyncio.sleep(0)

    with pytest.raises(PeerTimeoutError):
        await asyncio.wait_for(greet_very_often(), 5)


async def test_progress_may_move_the_deadline(world: ServerAndClient) -> None:
    stream = await world.stream()
    with stream.within(0.2):
        for _ in range(4):
            await asyncio.sleep(0.1)
            await stream.ask(Greet(), Welcome)
            stream.extend(0.2)


async def test_after_a_deadline_was_met_the_stream_lives(world: ServerAndClient) -> None:
    stream = await world.stream()
    with stream.within(0.05):
        await stream.ask(Greet(), Welcome)
    await asyncio.sleep(0.1)
    assert await stream.ask(Greet(), Welcome) == Welcome()


async def test_a_client_that_is_silent_for_too_long_loses_the_stream(world: ServerAndClient) -> None:
    world.message_timeout = 0.1
    with pytest.raises(PeerUnreachableError):
        await (await world.stream()).receive()


# versions

OLD_HEAD = ">2sBIQ"


async def test_a_message_of_a_later_version_is_refused_with_both_versions(world: ServerAndClient) -> None:
    stream = await world.stream()
    later = PROTOCOL_VERSION + 1
    await stream.stream.send(HEAD.pack(b"SK", later, 0, 0, 0.0))
    error = await remote_error(stream.answer(Welcome))
    assert f"version {later} is not {PROTOCOL_VERSION}" in str(error)
    assert f"peer with version {PROTOCOL_VERSION} needs an update" in str(error)


def test_two_peers_speak_the_newest_version_that_both_know() -> None:
    mine = VersionRange(2, 4)
    found = [mine.shared_with(theirs) for theirs in ((1, 1), (1, 2), (2, 3), (3, 9), (5, 9), (4, 3))]
    assert found == [None, 2, 3, 4, None, None]


async def test_a_server_goes_on_in_the_older_version_that_its_client_has_begun_with(
    world: ServerAndClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MessageStream, "versions", VersionRange(PROTOCOL_VERSION - 1, PROTOCOL_VERSION))
    stream = await world.stream()
    stream.version = PROTOCOL_VERSION - 1
    await stream.send(Greet())
    assert (await stream.stream.receive())[2] == PROTOCOL_VERSION - 1


async def test_a_client_begins_in_the_newest_version_that_the_server_announces(
    world: ServerAndClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "OWN_VERSIONS", VersionRange(PROTOCOL_VERSION, PROTOCOL_VERSION + 2))
    found = []
    for versions in (None, (1, PROTOCOL_VERSION), (1, PROTOCOL_VERSION + 1), (1, PROTOCOL_VERSION + 9)):
        stream = await world.stream(versions=versions)
        found.append(stream.version - PROTOCOL_VERSION)
        stream.close()
    assert found == [0, 0, 1, 2]


async def test_a_client_opens_no_stream_to_a_server_without_a_version_in_common(
    world: ServerAndClient,
) -> None:
    later = (PROTOCOL_VERSION + 1, PROTOCOL_VERSION + 2)
    with pytest.raises(ProtocolError) as caught:
        await world.stream(versions=later)
    assert f"version {later[0]} to {later[1]} is not {PROTOCOL_VERSION}" in str(caught.value)
    assert f"peer with version {PROTOCOL_VERSION} needs an update" in str(caught.value)


async def test_a_peer_changes_the_version_of_a_conversation_only_once(
    world: ServerAndClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MessageStream, "versions", VersionRange(PROTOCOL_VERSION - 1, PROTOCOL_VERSION))
    stream = await world.stream()
    for version in (PROTOCOL_VERSION - 1, PROTOCOL_VERSION):
        stream.version = version
        await stream.send(Greet())
        answer = await stream.stream.receive()
    assert b"needs an update" in answer


@pytest.mark.parametrize("sent_at", [math.nan, -1.0, math.inf])
async def test_a_message_that_was_sent_at_no_time_is_refused(world: ServerAndClient, sent_at: float) -> None:
    stream = await world.stream()
    await stream.stream.send(HEAD.pack(b"SK", PROTOCOL_VERSION, 0, 0, sent_at))
    assert "cannot have been sent" in str(await remote_error(stream.answer(Welcome)))


RECORDED_REQUEST = bytes.fromhex("534b01") + (14).to_bytes(4, "big") + bytes(8) + b"\x81\xa4type\xa7GetInfo"
"""What a client of version 1 sends to ask a server what it is doing."""


async def test_a_client_of_version_1_is_told_that_it_needs_an_update(world: ServerAndClient) -> None:
    stream = await world.client.open(world.server.peer_id, "swarmkit/1/talk")
    await stream.send(RECORDED_REQUEST)
    answer = await stream.receive()
    assert answer[:3] == b"SK\x01"
    fault = msgspec.msgpack.decode(answer[15:], type=dict)
    assert (fault["type"], fault["code"]) == ("Fault", "bad_message")
    assert "version 1 is not 2: the peer with version 1 needs an update" in fault["message"]


async def test_a_server_of_version_1_is_named_as_such(world: ServerAndClient) -> None:
    old = world.network.transport()

    async def serve(stream: Stream) -> None:
        await stream.receive()

    await old.listen("swarmkit/1/talk", serve)
    with pytest.raises(ProtocolError, match="version 1 is not 2: the peer with version 1 needs") as caught:
        await connect(world.client, TALK, old.peer_id)
    assert caught.value.peer_id == old.peer_id


async def test_a_server_of_no_version_does_not_serve_the_protocol(world: ServerAndClient) -> None:
    with pytest.raises(NotServedError, match="does not serve 'swarmkit/talk'"):
        await connect(world.client, TALK, world.network.transport().peer_id)
