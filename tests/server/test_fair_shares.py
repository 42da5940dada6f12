"""A stranger takes all that a server has, and a client beside it has its share all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import SESSION, Fault, Opened, Step, StepDone
from swarmkit.net.rpc.message_stream import CHUNK_BYTES, MessageStream
from swarmkit.net.transport.shares import Holder
from swarmkit.server.engine.admission_policy import Holding, beyond_share

from ..waiting import eventually
from .worlds import (
    HIDDEN,
    START,
    STOP,
    TinyClient,
    TinyServer,
    World,
    frame,
    hidden_states,
    small_settings,
)

TOKEN = hidden_states(1, 1)
SESSIONS = 8
ROWS, TOKENS = 160, 64
"""Of a step that is large: it takes more than a megabyte."""


@pytest.fixture
async def server(world: World) -> AsyncIterator[TinyServer]:
    settings = small_settings(
        max_step_tokens=ROWS * TOKENS,
        cache_bytes=64 * 1024**2,
        max_sessions=SESSIONS,
        receive_budget_bytes=4 * CHUNK_BYTES,
        max_admission_wait_s=30.0,
    )
    server = await TinyServer(world, settings).start()
    yield server
    await server.close()


class Stranger:
    """A peer with any number of streams to a server."""

    def __init__(self, server: TinyServer) -> None:
        self.server = server
        self.transport = server.network.transport()
        server.transports.append(self.transport)
        self.clients: list[TinyClient] = []

    async def stream(self) -> TinyClient:
        peer = self.server.transport.peer_id
        stream = await self.transport.open(peer, SESSION.endpoint)
        client = TinyClient(MessageStream(stream, SESSION, 2**24), self.server.world.checkpoint.fingerprint)
        self.clients.append(client)
        return client

    async def session(self) -> TinyClient:
        client = await self.stream()
        assert isinstance(await client.open(), Opened)
        return client


async def dismissed(client: TinyClient) -> Fault:
    """What a stranger is told that has to give way."""
    message = await asyncio.wait_for(client.answer(), 60)
    assert isinstance(message, Fault), message
    return message


async def test_one_peer_may_have_all_sessions(server: TinyServer) -> None:
    stranger = Stranger(server)
    for _ in range(SESSIONS):
        await stranger.session()
    assert server.service.num_sessions == SESSIONS


async def test_a_client_opens_its_session_though_a_stranger_has_them_all(server: TinyServer) -> None:
    stranger = Stranger(server)
    for _ in range(SESSIONS):
        await (await stranger.session()).step(TOKEN)
    client = await server.session()
    assert isinstance(await client.try_step(TOKEN), StepDone)
    fault = await dismissed(stranger.clients[0])
    assert (fault.code, fault.retry_after_s > 0) == ("busy", True)


async def test_a_stranger_that_opens_more_is_refused_while_the_client_has_its_share(
    server: TinyServer,
) -> None:
    stranger = Stranger(server)
    for _ in range(SESSIONS):
        await stranger.session()
    client = await server.session()
    assert isinstance(await (await stranger.stream()).open(), Fault)
    assert isinstance(await client.try_step(TOKEN), StepDone)


async def test_a_client_is_served_though_a_stranger_has_all_streams(server: TinyServer) -> None:
    stranger = Stranger(server)
    for _ in range(SESSIONS + 64):
        await stranger.stream()
    await eventually(lambda: server.service.resources().streams == SESSIONS + 64, "all streams are open")
    client = await server.session()
    assert isinstance(await client.try_step(TOKEN), StepDone)


async def test_a_client_sends_a_prompt_though_slow_payloads_hold_all_memory(server: TinyServer) -> None:
    stranger = Stranger(server)
    slow = Step(0, TensorSpec((ROWS, TOKENS, HIDDEN), "float32"), 1)
    for _ in range(3):
        client = await stranger.stream()
        await client.open(max_length=128)
        header = frame(slow, payload_bytes=ROWS * TOKENS * HIDDEN * 4)
        await client.send_frames(header)
    budget = server.service.receive_budget
    await eventually(lambda: budget.held_bytes > budget.capacity_bytes / 2, "they hold memory")
    prompt = hidden_states(ROWS, TOKENS)
    client = await server.session()
    assert isinstance(await asyncio.wait_for(client.try_step(prompt), 60), StepDone)


async def test_a_client_has_its_share_of_the_cache_though_a_stranger_fills_it(world: World) -> None:
    page = 32 * world.kv_bytes * (STOP - START)
    server = await TinyServer(world, small_settings(cache_bytes=4 * page)).start()
    stranger = Stranger(server)
    for _ in range(4):
        await (await stranger.session()).step(TOKEN)
    client = await server.session()
    assert isinstance(await client.try_step(TOKEN), StepDone)
    assert isinstance(await client.try_step(hidden_states(1, 16), position=1), StepDone)
    server.used()  # audits
    await server.close()


def test_a_session_that_runs_a_step_ends_last() -> None:
    stranger, client = Holder("", "stranger"), Holder("", "client")
    holdings = [
        Holding("running", 1, 9.0, stranger, busy=True),
        Holding("recent", 1, 1.0, stranger),
        Holding("idle", 1, 5.0, stranger),
    ]
    assert beyond_share(holdings, client, 1, 3) == ["idle"]
    assert beyond_share(holdings[:1], client, 1, 1) == []
