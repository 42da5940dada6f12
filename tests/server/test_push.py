"""A step's output goes straight to the next server, which believes the one before no more than a client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import torch

from swarmkit.errors import PeerUnreachableError
from swarmkit.net.protocol.codec import passed
from swarmkit.net.protocol.messages import (
    PUSH,
    Attach,
    Attached,
    Fault,
    Link,
    Linked,
    Message,
    StepDone,
    Unlinked,
)
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.rpc.server_stream import ServerStream
from swarmkit.net.transport.memory import MemoryNetwork

from ..waiting import eventually
from .attacks import BYTES, HELD, LENGTH, ROWS, STEP, STEPPING, Attack, step_of
from .worlds import (
    HEAD,
    START,
    STOP,
    TinyClient,
    TinyServer,
    World,
    alone,
    fault_of,
    frame,
    hidden_states,
    same,
)

CUT = 2
TOKEN = hidden_states(1, 1, 3)
PROMPT = hidden_states(1, 4, 4)


class Pair:
    """Two servers of a network; a session of blocks [1, 2) at the first, and one of [2, 4) at the second."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.network = MemoryNetwork()
        self.first, self.second = TinyServer(world), TinyServer(world)

    async def start(self) -> Pair:
        for server in (self.first, self.second):
            server.network = self.network
            await server.start()
        self.one = await self.first.session(start=START, stop=CUT)
        self.two = await self.second.session(start=CUT, stop=STOP)
        return self

    async def link(self, inlet: str | None = None, peer_id: str | None = None) -> Message:
        """Have the first server's session hand its outputs on."""
        peer = self.second.transport.peer_id if peer_id is None else peer_id
        return await self.one.ask(Link(peer, (), self.two.inlet if inlet is None else inlet))

    async def push(self, hidden: torch.Tensor, number: int = 1, **options: Any) -> tuple[StepDone, Message]:
        """A step that is sent to the first server only; what both sessions' clients are told."""
        reply = await self.one.try_step(hidden, number=number, forward=1, **options)
        assert isinstance(reply, StepDone), reply
        return reply, await self.two.answer()

    def output(self, client: TinyClient) -> torch.Tensor:
        received = client.received[-1]
        tensor: torch.Tensor = received.tensor(received.message.hidden)
        return tensor

    async def close(self) -> None:
        await self.first.close()
        await self.second.close()


@pytest.fixture
async def pair(world: World) -> AsyncIterator[Pair]:
    pair = await Pair(world).start()
    yield pair
    await pair.close()


def through_both(world: World, *steps: torch.Tensor) -> list[torch.Tensor]:
    return alone(world, alone(world, steps, START, CUT), CUT, STOP)


# the way


async def test_outputs_go_on_to_the_next_server_and_from_there_to_the_client(
    pair: Pair, world: World
) -> None:
    assert await pair.link() == Linked()
    for number, (hidden, wanted) in enumerate(
        zip([PROMPT, TOKEN], through_both(world, PROMPT, TOKEN), strict=True), start=1
    ):
        done, answer = await pair.push(hidden, number)
        assert isinstance(answer, StepDone)
        assert (done.number, done.forwarded, answer.number, answer.forwarded) == (number, True, number, False)
        assert same(pair.output(pair.two), wanted)


async def test_both_are_given_the_same_in_the_codec_that_was_asked_for(pair: Pair, world: World) -> None:
    await pair.link()
    done, answer = await pair.push(PROMPT, answers=("int8", "bfloat16"))
    assert isinstance(answer, StepDone)
    assert (done.hidden.codec, answer.hidden.codec) == ("int8", "bfloat16")
    between = passed(alone(world, [PROMPT], START, CUT)[0], "int8")
    assert same(pair.output(pair.one), between)
    assert torch.equal(
        pair.output(pair.two), passed(alone(world, [pair.output(pair.one)], CUT, STOP)[0], "bfloat16")
    )


async def test_the_client_gets_what_was_handed_on_as_well(pair: Pair, world: World) -> None:
    await pair.link()
    await pair.push(PROMPT)
    assert same(pair.output(pair.one), alone(world, [PROMPT], START, CUT)[0])


async def test_a_step_that_is_not_to_be_forwarded_is_not(pair: Pair) -> None:
    await pair.link()
    reply = await pair.one.try_step(PROMPT, number=1)
    assert isinstance(reply, StepDone)
    assert not reply.forwarded
    assert pair.second.service.steps == 0


async def test_a_server_without_a_link_says_that_it_did_not_forward(pair: Pair) -> None:
    reply = await pair.one.try_step(PROMPT, number=1, forward=1)
    assert isinstance(reply, StepDone)
    assert not reply.forwarded


async def test_mask_positions_and_order_come_along(pair: Pair, world: World) -> None:
    prompt, token = hidden_states(2, 4, 8), hidden_states(3, 1, 9)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.uint8)
    positions = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]])
    order = (1, 0, 1)
    late_mask = torch.cat([mask[list(order)], torch.ones(3, 1, dtype=torch.uint8)], dim=1)
    late_positions = torch.tensor([[4], [3], [4]])
    first, second = world.stage.new_cache(START, CUT), world.stage.new_cache(CUT, STOP)
    for cache in (first, second):
        prompt = world.stage.forward(prompt, cache, attention_mask=mask, position_ids=positions)
        cache.edit(4, order)
        token = world.stage.forward(token, cache, attention_mask=late_mask, position_ids=late_positions)

    await pair.link()
    await pair.push(hidden_states(2, 4, 8), 1, mask=mask, positions=positions)
    await pair.push(hidden_states(3, 1, 9), 2, mask=late_mask, positions=late_positions, order=order)

    assert same(pair.output(pair.two), token)


async def test_a_client_may_send_in_the_midst_of_pushes(pair: Pair, world: World) -> None:
    await pair.link()
    wanted = through_both(world, PROMPT, TOKEN, TOKEN)
    await pair.push(PROMPT, 1)
    pair.two.position = PROMPT.shape[1]
    await pair.one.step(TOKEN, number=2)
    own = await pair.two.step(pair.output(pair.one), number=2)
    await pair.push(TOKEN, 3)
    assert same(own, wanted[1])
    assert same(pair.output(pair.two), wanted[2])


# what does not go


async def test_a_link_to_nobody_is_refused(pair: Pair) -> None:
    stranger = MemoryNetwork().transport()
    fault = await fault_of(pair.link(peer_id=stranger.peer_id))
    assert fault.code == "not_linked"
    assert isinstance(await pair.one.try_step(TOKEN), StepDone)


async def test_a_link_to_no_session_is_refused(pair: Pair) -> None:
    assert (await fault_of(pair.link(inlet="0" * 32))).code == "not_linked"


async def test_a_link_to_a_session_that_takes_no_pushes_is_refused(pair: Pair) -> None:
    assert (await fault_of(pair.link(inlet=""))).code == "not_linked"


async def test_a_server_that_hands_on_to_nobody_says_so(world: World) -> None:
    server = await TinyServer(world, hands_on=False).start()
    client = await server.session()
    fault = await fault_of(client.ask(Link(server.transport.peer_id, (), client.inlet)))
    assert fault.code == "not_linked"
    await server.close()


async def test_a_link_to_a_session_that_ended_is_given_up(pair: Pair) -> None:
    await pair.link()
    pair.two.close()
    await eventually(lambda: not pair.second.service.num_sessions, "the second session ends")
    for number in (1, 2):  # what is sent into a stream just before its end is known may still seem to go
        reply = await pair.one.try_step(TOKEN, number=number, forward=1)
        await asyncio.sleep(0.01)
    assert isinstance(reply, StepDone)
    assert not reply.forwarded


async def test_a_session_that_ends_sends_its_pushers_away(pair: Pair) -> None:
    source = await attached(pair)
    pair.two.close()
    with pytest.raises(PeerUnreachableError):
        await asyncio.wait_for(source.receive(), 5)
    assert pair.second.used() == (0, 0, 0)


async def test_a_session_that_ends_while_a_pushed_step_runs_gives_back_what_it_held(pair: Pair) -> None:
    await pair.link()
    await pair.one.try_step(PROMPT, number=1, forward=1)
    pair.two.close()
    await asyncio.wait_for(pair.second.empty(), 5)


async def test_a_session_that_ends_while_its_answer_is_on_its_way_gives_back_what_it_held(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not take its answer, and goes."""
    send, on_its_way = ServerStream.send, asyncio.Event()

    async def never_taken(caller: ServerStream, message: Message, *payload: Any) -> None:
        if isinstance(message, StepDone) and not message.forwarded:  # from the last server
            on_its_way.set()
            await asyncio.Event().wait()
        await send(caller, message, *payload)

    monkeypatch.setattr(ServerStream, "send", never_taken)
    await pair.link()
    await pair.one.try_step(PROMPT, number=1, forward=1)
    await asyncio.wait_for(on_its_way.wait(), 5)
    pair.two.close()
    await asyncio.wait_for(pair.second.empty(), 5)


async def test_the_client_is_told_when_the_server_before_is_gone(pair: Pair) -> None:
    source = await attached(pair)
    await source.stream.send(*step_of(TOKEN, position=0, number=3))
    assert isinstance(await pair.two.answer(), StepDone)
    source.close()
    assert await pair.two.answer() == Unlinked(3)


# what is believed


async def attached(pair: Pair) -> MessageStream:
    """Somebody who may push into the second server's session."""
    stream = await pair.network.transport().open(pair.second.transport.peer_id, PUSH.endpoint)
    source = MessageStream(stream, PUSH, 2**24)
    await source.send(Attach(pair.two.inlet))
    assert (await source.receive()).message == Attached()
    return source


async def test_who_does_not_know_the_secret_may_not_push(pair: Pair) -> None:
    stream = await pair.network.transport().open(pair.second.transport.peer_id, PUSH.endpoint)
    source = MessageStream(stream, PUSH, 2**24)
    await source.send(Attach("f" * 32))
    reply = (await source.receive()).message
    assert isinstance(reply, Fault)
    assert reply.code == "not_linked"
    with pytest.raises(PeerUnreachableError):
        await source.receive()


async def test_a_step_that_comes_too_late_is_dropped(pair: Pair, world: World) -> None:
    source = await attached(pair)
    await pair.two.step(PROMPT, number=5)
    for number in (0, 4, 5):
        await source.stream.send(*step_of(hidden_states(1, 1, 9), position=0, number=number))
    await source.stream.send(*step_of(TOKEN, position=4, number=6))
    reply = await pair.two.answer()
    assert isinstance(reply, StepDone)
    assert reply.number == 6
    assert same(pair.output(pair.two), alone(world, [PROMPT, TOKEN], CUT, STOP)[1])


@pytest.mark.parametrize("attack", [a for a in STEPPING if a.code != "bad_message"], ids=str)
async def test_a_push_is_checked_as_a_step_of_the_client_is(pair: Pair, world: World, attack: Attack) -> None:
    two = pair.two = await pair.second.session(start=CUT, stop=STOP, max_length=LENGTH)
    held = hidden_states(ROWS, HELD)
    await two.step(held, number=1)
    source = await attached(pair)
    for piece in attack.frames:
        await source.stream.send(with_number(piece, 7))
    answer = await two.answer()
    if attack.says.endswith("allowed"):  # of a message that is too large, nothing more is read
        assert answer == Unlinked(1)
    else:
        assert isinstance(answer, Fault)
        assert (answer.code, answer.number) == ("upstream", 7)

    after = hidden_states(ROWS, 1, 5)
    assert same(await two.step(after, number=8), alone(world, [held, after], CUT, STOP)[1])


@pytest.mark.parametrize("attack", [a for a in BYTES if a.frames[0][:14] != STEP[:14]], ids=str)
async def test_a_pusher_of_nonsense_is_sent_away_and_the_client_told(
    pair: Pair, world: World, attack: Attack
) -> None:
    await pair.two.step(PROMPT, number=1)
    source = await attached(pair)
    with contextlib.suppress(PeerUnreachableError):
        for piece in attack.frames:
            await source.stream.send(piece)
    assert await pair.two.answer() == Unlinked(1)
    with pytest.raises(PeerUnreachableError):
        await asyncio.wait_for(source.receive(), 5)
    assert same(await pair.two.step(TOKEN, number=2), alone(world, [PROMPT, TOKEN], CUT, STOP)[1])


def with_number(piece: bytes, number: int) -> bytes:
    """A message in one frame, with another number."""

    _, _, header_bytes, payload_bytes, _ = HEAD.unpack_from(piece)
    header = msgspec.msgpack.decode(piece[HEAD.size : HEAD.size + header_bytes])
    header["number"] = number
    return frame(header, piece[HEAD.size + header_bytes :], payload_bytes=payload_bytes)
