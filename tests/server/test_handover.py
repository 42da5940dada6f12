"""Keys and values go from a server that leaves to the one that goes on, which believes none of it unseen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import torch

from swarmkit.net.protocol import codec, handover_messages
from swarmkit.net.protocol.handover_messages import (
    HANDOVER,
    AwaitKeys,
    BringKeys,
    BroughtKeys,
    GetKeysTaken,
    HandedOver,
    HandOver,
    KeysAwaited,
    KeysPiece,
    KeysTaken,
    KeysWelcome,
    key_pieces,
)
from swarmkit.net.protocol.messages import SESSION, Fault, Opened
from swarmkit.net.protocol.protocol import Protocol
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.net.transport.memory import MemoryNetwork
from swarmkit.net.transport.seam import Transport
from swarmkit.server.sessions.session import ServedSession

from ..waiting import eventually
from .worlds import START, STOP, TinyClient, TinyServer, World, alone, hidden_states, same, small_settings

TOKENS = 12
PROMPT = hidden_states(1, TOKENS, 1)
TOKEN = hidden_states(1, 1, 2)


class Move:
    """A server that leaves, with a session, and another one at which the session's client has one as well."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.network = MemoryNetwork()
        self.old, self.new = TinyServer(world), TinyServer(world)
        self.streams: list[MessageStream] = []

    async def start(self) -> Move:
        for server in (self.old, self.new):
            server.network = self.network
            await server.start()
        self.client = await self.old.join()
        self.before, self.after = await self.session(self.old), await self.session(self.new)
        await self.before.step(PROMPT)
        self.old.service.leaving = True
        return self

    async def close(self) -> None:
        await self.old.close()
        await self.new.close()

    async def stream(
        self, server: TinyServer, protocol: Protocol = HANDOVER, by: Transport | None = None
    ) -> MessageStream:
        """A stream of the client, or of another peer."""
        opened = await (by or self.client).open(server.transport.peer_id, protocol.endpoint)
        return MessageStream(opened, protocol, 2**24)

    async def session(self, server: TinyServer) -> TinyClient:
        client = TinyClient(await self.stream(server, SESSION), self.world.checkpoint.fingerprint)
        opened = await client.open()
        assert isinstance(opened, Opened)
        client.inlet = opened.inlet
        return client

    async def await_keys(self, sender: Transport | None = None, **changes: Any) -> Any:
        """Have the new server await the keys and values; its answer."""
        peer_id = (sender or self.old.transport).peer_id
        self.awaiting = await self.stream(self.new)
        await self.awaiting.send(
            msgspec.structs.replace(AwaitKeys(self.after.inlet, 1, TOKENS, peer_id), **changes)
        )
        return (await self.awaiting.receive()).message

    async def hand_over(self, by: Transport | None = None, **changes: Any) -> Any:
        """Ask the old server; its answer."""
        awaited = await self.await_keys()
        assert isinstance(awaited, KeysAwaited)
        ask = HandOver(self.before.inlet, 1, TOKENS, self.new.transport.peer_id, 0, awaited.ticket)
        here = await self.stream(self.old, by=by)
        await here.send(msgspec.structs.replace(ask, **changes))
        return (await here.receive()).message

    async def taken(self) -> int:
        """How many tokens the new server says it has taken."""
        await self.awaiting.send(GetKeysTaken())
        message = (await self.awaiting.receive()).message
        assert isinstance(message, KeysTaken)
        return message.tokens

    async def welcome(self, sender: Transport) -> MessageStream:
        """A stream on which the new server takes keys and values of a peer."""
        awaited = await self.await_keys(sender)
        bringing = await self.stream(self.new, by=sender)
        await bringing.send(BringKeys(awaited.ticket))
        assert isinstance((await bringing.receive()).message, KeysWelcome)
        return bringing

    async def has_begun(self, position: int, hidden: torch.Tensor) -> torch.Tensor:
        """The next output of the session at the new server."""
        return await self.after.step(hidden, position=position)


@pytest.fixture
async def move(world: World) -> AsyncIterator[Move]:
    move = await Move(world).start()
    yield move
    await move.close()


def session_of(server: TinyServer) -> ServedSession:
    (session,) = server.service.sessions
    return session


def states(server: TinyServer) -> list[torch.Tensor]:
    """All that the only session of a server holds."""
    cache = session_of(server).cache
    return [part for block in range(STOP - START) for part in cache.states(block, 0, cache.tokens)]


# the way


async def test_the_new_server_holds_what_the_old_one_held_bit_for_bit(move: Move) -> None:
    assert isinstance(await move.hand_over(), HandedOver)
    assert await move.taken() == TOKENS
    assert all(map(torch.equal, states(move.new), states(move.old)))
    move.new.service.audit()


async def test_the_session_goes_on_at_the_new_server(move: Move, world: World) -> None:
    await move.hand_over()
    output = await move.has_begun(TOKENS, TOKEN)
    assert same(output, alone(world, [PROMPT, TOKEN])[1])


async def test_small_pieces_add_up(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover_messages, "PIECE_BYTES", 5 * move.world.kv_bytes)
    assert isinstance(await move.hand_over(), HandedOver)
    assert all(map(torch.equal, states(move.new), states(move.old)))


async def test_a_session_that_was_cut_back_brings_what_it_keeps(move: Move, world: World) -> None:
    awaited = await move.await_keys(tokens=5)
    here = await move.stream(move.old)
    await here.send(HandOver(move.before.inlet, 1, 5, move.new.transport.peer_id, 0, awaited.ticket))
    assert isinstance((await here.receive()).message, HandedOver)
    output = await move.has_begun(5, TOKEN)
    assert same(output, alone(world, [PROMPT[:, :5], TOKEN])[1])


def test_pieces_are_bounded_and_leave_nothing_out() -> None:
    most = handover_messages.PIECE_BYTES
    assert key_pieces([most // 2, 2 * most], 3) == [
        KeysPiece(0, 0, 2),
        KeysPiece(0, 2, 3),
        KeysPiece(1, 0, 1),
        KeysPiece(1, 1, 2),
        KeysPiece(1, 2, 3),
    ]


# whom the old server hands over to, and for whom


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"rows": 2}, "out_of_order"),
        ({"tokens": TOKENS + 1}, "out_of_order"),
        ({"session": "a" * 32}, "not_held"),
        ({"ticket": "a" * 32}, "not_linked"),
        ({"peer_id": "nobody"}, "not_linked"),
    ],
    ids=["other rows", "more tokens", "no such session", "another ticket", "no such peer"],
)
async def test_a_server_hands_over_only_what_it_holds_to_who_awaits_it(
    move: Move, changes: dict[str, Any], code: str
) -> None:
    reply = await move.hand_over(**changes)
    assert isinstance(reply, Fault)
    assert reply.code == code
    assert await move.taken() == 0


async def test_a_server_that_stays_hands_nothing_over(move: Move) -> None:
    move.old.service.leaving = False
    reply = await move.hand_over()
    assert isinstance(reply, Fault)
    assert reply.code == "not_held"


async def test_a_stranger_cannot_have_a_session_handed_over(move: Move) -> None:
    reply = await move.hand_over(by=await move.old.join())
    assert isinstance(reply, Fault)
    assert reply.code == "not_held"


async def test_a_server_that_did_not_announce_the_blocks_is_not_dialled(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none(link: object, block: int) -> tuple[str, ...]:
        return () if block == STOP - 1 else ("/memory/elsewhere",)

    links = move.old.handover.links
    assert links is not None
    monkeypatch.setattr(links, "find", none)
    dialled: list[object] = []
    monkeypatch.setattr(move.old.transport, "open", lambda *args: dialled.append(args))
    reply = await move.hand_over()
    assert isinstance(reply, Fault)
    assert (reply.code, dialled) == ("not_linked", [])


async def test_the_session_goes_on_at_the_old_server_if_the_new_one_does_not_take_it(
    move: Move, world: World
) -> None:
    await move.hand_over(ticket="a" * 32)
    assert same(await move.before.step(TOKEN), alone(world, [PROMPT, TOKEN])[1])


# what a hostile server brings


def keys(
    move: Move, block: int = START, position: int = 0, tokens: int = TOKENS, fill: float = 0.5, **changes: Any
) -> tuple[BroughtKeys, list[memoryview]]:
    """A piece, with its payload, which may be wrong."""
    like = session_of(move.old).cache.states(0, 0, 1)
    parts = [torch.full((*part.shape[:2], tokens, part.shape[3]), fill) for part in like]
    encoded = [codec.encode(part.to(changes.get("dtype", part.dtype))) for part in parts]
    return BroughtKeys(block, position, encoded[0][0], encoded[1][0]), [data for _, data in encoded]


BAD: dict[str, Callable[[Move], list[tuple[BroughtKeys, list[memoryview]]]]] = {
    "another block": lambda move: [keys(move, block=START + 1)],
    "another position": lambda move: [keys(move, position=1)],
    "too few tokens": lambda move: [keys(move, tokens=TOKENS - 1)],
    "too many tokens": lambda move: [keys(move, tokens=TOKENS + 1)],
    "another type": lambda move: [keys(move, dtype=torch.float16)],
    "not a number": lambda move: [keys(move, fill=float("nan"))],
    "infinite": lambda move: [keys(move, fill=float("inf"))],
    "the same again": lambda move: [keys(move), keys(move)],
    "not a number in the last block": lambda move: [
        *(keys(move, block=block) for block in range(START, STOP - 1)),
        keys(move, block=STOP - 1, fill=float("nan")),
    ],
}


@pytest.mark.parametrize("what", BAD)
async def test_wrong_keys_and_values_change_nothing(move: Move, world: World, what: str) -> None:
    sender = await move.old.join()
    bringing = await move.welcome(sender)
    for message, payload in BAD[what](move):
        await bringing.send(message, payload)
    assert isinstance((await bringing.receive()).message, Fault)
    assert await move.taken() == 0
    assert move.new.used() == (1, 0, 0)
    assert same(await move.has_begun(0, PROMPT), alone(world, [PROMPT])[0])


async def test_more_than_was_awaited_ends_the_stream(move: Move) -> None:
    sender = await move.old.join()
    bringing = await move.welcome(sender)
    for block in range(START, STOP):
        await bringing.send(*keys(move, block=block))
    assert isinstance((await bringing.receive()).message, KeysTaken)
    await bringing.send(*keys(move))
    reply = (await bringing.receive()).message
    assert isinstance(reply, Fault)
    assert reply.code == "illegal_message"


@pytest.mark.parametrize("which", ["another peer", "another ticket"])
async def test_a_stranger_brings_nothing_into_a_session(move: Move, which: str) -> None:
    awaited = await move.await_keys()
    by = await move.old.join() if which == "another peer" else move.old.transport
    bringing = await move.stream(move.new, by=by)
    await bringing.send(BringKeys("b" * 32 if which == "another ticket" else awaited.ticket))
    reply = (await bringing.receive()).message
    assert isinstance(reply, Fault)
    assert reply.code == "not_linked"
    assert move.new.used() == (1, 0, 0)


async def test_a_stranger_cannot_have_keys_awaited_for_a_clients_session(move: Move) -> None:
    stream = await move.stream(move.new, by=await move.old.join())
    await stream.send(AwaitKeys(move.after.inlet, 1, TOKENS, move.old.transport.peer_id))
    reply = (await stream.receive()).message
    assert isinstance(reply, Fault)
    assert reply.code == "not_held"


async def test_a_server_that_stops_in_the_middle_leaves_nothing(move: Move) -> None:
    bringing = await move.welcome(await move.old.join())
    await bringing.send(*keys(move))
    bringing.close()
    await eventually(lambda: move.new.used() == (1, 0, 0), "nothing is leased")


async def test_a_client_that_awaits_no_more_has_its_session_at_once(move: Move, world: World) -> None:
    bringing = await move.welcome(await move.old.join())
    await bringing.send(*keys(move))  # and nothing after it, ever
    move.awaiting.close()
    assert same(await move.has_begun(0, PROMPT), alone(world, [PROMPT])[0])


async def test_a_session_that_ends_meanwhile_gives_everything_back(move: Move) -> None:
    bringing = await move.welcome(await move.old.join())
    await bringing.send(*keys(move))
    move.after.close()
    await move.new.empty()


async def test_a_session_that_has_begun_takes_nothing(move: Move) -> None:
    awaited = await move.await_keys()
    await move.has_begun(0, PROMPT)
    bringing = await move.stream(move.new, by=move.old.transport)
    await bringing.send(BringKeys(awaited.ticket))
    await bringing.receive()
    reply = (await bringing.receive()).message
    assert isinstance(reply, Fault)
    assert reply.code == "out_of_order"


async def test_keys_and_values_need_room_in_the_cache(world: World, move: Move) -> None:
    move.new.service.set_limits(small_settings(cache_bytes=1).limits)
    reply = await move.hand_over()
    assert isinstance(reply, Fault)
    assert reply.code == "not_linked"
    assert move.new.used() == (1, 0, 0)


async def test_a_new_server_that_took_less_is_not_believed(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(caller: object, awaited: Any) -> None:
        awaited.taken = TOKENS - 1

    monkeypatch.setattr(move.new.handover, "take", nothing)
    reply = await move.hand_over()
    assert isinstance(reply, Fault)
    assert reply.code == "not_linked"
