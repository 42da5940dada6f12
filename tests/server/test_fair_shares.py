"""A stranger takes all that a server has, and a client beside it has its share all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from torch import Tensor

from swarmkit.net.protocol.adapter_messages import AdapterKept
from swarmkit.net.protocol.codec import TensorSpec
from swarmkit.net.protocol.messages import SESSION, Fault, Linked, Opened, Step, StepDone
from swarmkit.net.rpc.message_stream import CHUNK_BYTES, MessageStream
from swarmkit.net.transport.shares import Holder
from swarmkit.server.adapters import service as adapter_service
from swarmkit.server.engine.admission_policy import Holding, beyond_share

from ..takers import Taking, Target, a_gradient, a_push, an_adapter, take
from ..waiting import eventually
from .test_adapters import Owner, serve_adapters
from .test_adapters import an_adapter as an_adapter_of
from .test_gradients import TrainingServer
from .test_push import Pair
from .worlds import (
    HIDDEN,
    MAX_STEP_TOKENS,
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
PUSHERS, ADAPTER_STREAMS = SESSIONS + 64, 256
"""How many streams there are for pushes, and for adapters."""
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


# floods


def target_of(server: TinyServer, **more: Any) -> Target:
    """A server, as a stranger in its network sees it."""
    transport = server.network.transport()
    server.transports.append(transport)
    peer, fingerprint = server.transport.peer_id, server.world.checkpoint.fingerprint
    return Target(transport, peer, fingerprint, START, STOP, HIDDEN, MAX_STEP_TOKENS, **more)


@asynccontextmanager
async def taking(target: Target, one: Taking, number: int) -> AsyncIterator[None]:
    """A stranger takes all that it can get, inside the block."""
    task = asyncio.create_task(take(target, one, number))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_server_can_push_though_a_stranger_has_all_streams_for_pushes(world: World) -> None:
    pair = await Pair(world).start()
    async with taking(target_of(pair.second), a_push, PUSHERS):
        resources = pair.second.service.resources
        await eventually(lambda: resources().pushers >= PUSHERS - 1, "the stranger has them all")
        assert await pair.link() == Linked()
        _, answer = await pair.push(TOKEN)
        assert isinstance(answer, StepDone)
    await pair.close()


async def test_a_client_trains_beside_a_stranger_that_floods_the_server_with_requests(world: World) -> None:
    server = await TrainingServer(world, max_gradient_streams=4).start()
    gradients = server.gradients
    async with taking(target_of(server), a_gradient, 8):
        await eventually(
            lambda: gradients.requests >= 8 and len(gradients.streams) >= 4, "the stranger is busy"
        )
        line = await server.line()
        for _ in range(3):
            assert isinstance(await asyncio.wait_for(line.ask(hidden_states(1, 4)), 60), Tensor)
    await server.close()


async def test_a_client_decodes_beside_a_stranger_that_floods_the_server_with_requests(world: World) -> None:
    server = await TrainingServer(world).start()
    async with taking(target_of(server), a_gradient, 8):
        await eventually(lambda: server.gradients.requests >= 8, "the stranger is busy")
        client = await server.session()
        for _ in range(8):
            assert isinstance(await asyncio.wait_for(client.try_step(TOKEN), 60), StepDone)
    await server.close()


async def test_a_client_keeps_its_adapter_beside_a_stranger_that_floods_the_server_with_adapters(
    world: World,
) -> None:
    adapter = an_adapter_of(world)
    room = 2 * adapter.nbytes
    server = await TinyServer(world, small_settings(adapter_bytes=room, client_adapter_bytes=room)).start()
    adapters = await serve_adapters(server)
    async with taking(target_of(server, adapter_bytes=adapter.nbytes), an_adapter, ADAPTER_STREAMS):
        await eventually(lambda: len(adapters.streams) >= ADAPTER_STREAMS - 1, "the stranger has all streams")
        owner = Owner(world, await server.join(), server)
        assert await asyncio.wait_for(owner.put(adapter), 60) == AdapterKept(adapter.digest)
    await server.close()


async def test_a_client_that_sends_one_adapter_after_the_other_waits_by_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (an_adapter_of(world, seed=seed) for seed in range(2))
    monkeypatch.setattr(adapter_service, "BYTES_PER_S", 1e-3)
    monkeypatch.setattr(adapter_service, "BYTES_AT_ONCE", first.nbytes)
    server = await TinyServer(world, small_settings()).start()
    await serve_adapters(server)
    many, one = [Owner(world, await server.join(), server) for _ in range(2)]
    assert await many.put(first) == AdapterKept(first.digest)
    again = asyncio.create_task(many.put(second))
    assert await asyncio.wait_for(one.put(second), 60) == AdapterKept(second.digest)
    assert not again.done()
    again.cancel()
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
