"""The server's half of the protocol, for clients that mean well; `test_hostile_input` has the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import msgspec
import pytest
import torch

from swarmkit.errors import PeerUnreachableError
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.net.protocol.codec import CodecName, passed
from swarmkit.net.protocol.messages import GetInfo, Opened, ServerInfo, StepDone
from swarmkit.net.transport.memory import MemoryNetwork

from ..waiting import eventually
from .worlds import (
    HIDDEN,
    MAX_LENGTH,
    MAX_STEP_TOKENS,
    START,
    STOP,
    TinyServer,
    World,
    alone,
    fault_of,
    hidden_states,
    small_settings,
)

PROMPT, TOKEN, OTHER = hidden_states(2, 3, 1), hidden_states(2, 1, 2), hidden_states(2, 1, 3)


async def started(world: World, **settings: object) -> TinyServer:
    return await TinyServer(world, small_settings(**settings)).start()


@pytest.fixture
async def tight(world: World) -> AsyncIterator[TinyServer]:
    """A server with room for two pages of one row."""
    server = await started(world, cache_bytes=2 * PAGE_TOKENS * world.kv_bytes * (STOP - START))
    yield server
    await server.close()


@pytest.fixture
async def hasty(world: World) -> AsyncIterator[TinyServer]:
    """A server that waits a tenth of a second at most."""
    server = await started(world, message_timeout_s=0.1)
    yield server
    await server.close()


class Gate:
    """Something long on the engine, which ends when the test says so."""

    def __init__(self, server: TinyServer) -> None:
        self._passed = threading.Event()
        self.running = asyncio.create_task(server.engine.run(self._passed.wait))

    async def open(self) -> None:
        self._passed.set()
        await self.running


# sessions and steps


async def test_open_tells_how_large_a_step_may_be(server: TinyServer) -> None:
    client = await server.client()
    reply = await client.open()
    assert isinstance(reply, Opened)
    assert reply.max_step_tokens == MAX_STEP_TOKENS


async def test_a_session_computes_what_the_stage_computes(server: TinyServer, world: World) -> None:
    client = await server.session()
    outputs = [await client.step(PROMPT), await client.step(TOKEN)]
    assert all(map(torch.equal, outputs, alone(world, [PROMPT, TOKEN])))


async def test_a_session_may_use_some_of_the_blocks(server: TinyServer, world: World) -> None:
    client = await server.session(start=START + 1, stop=STOP - 1)
    outputs = [await client.step(PROMPT), await client.step(TOKEN)]
    assert all(map(torch.equal, outputs, alone(world, [PROMPT, TOKEN], START + 1, STOP - 1)))


async def test_two_sessions_interleaved_are_what_each_is_alone(server: TinyServer, world: World) -> None:
    one, two = await server.session(), await server.session()
    of_one, of_two = [await one.step(PROMPT)], [await two.step(OTHER)]
    of_one, of_two = [*of_one, await one.step(TOKEN)], [*of_two, await two.step(TOKEN)]
    assert all(map(torch.equal, of_one, alone(world, [PROMPT, TOKEN])))
    assert all(map(torch.equal, of_two, alone(world, [OTHER, TOKEN])))


async def test_a_step_at_an_earlier_position_forgets_what_came_after(
    server: TinyServer, world: World
) -> None:
    client = await server.session()
    await client.step(PROMPT)
    await client.step(OTHER)
    output = await client.step(TOKEN, position=3)
    assert torch.equal(output, alone(world, [PROMPT, TOKEN])[1])


async def test_a_step_at_position_0_begins_anew_with_any_batch(server: TinyServer, world: World) -> None:
    client = await server.session()
    await client.step(PROMPT)
    output = await client.step(PROMPT[:1], position=0)
    assert torch.equal(output, alone(world, [PROMPT[:1]])[0])


@pytest.mark.parametrize("order", [(1, 0), (0, 0), (1,), (1, 0, 1)])
async def test_rows_are_reordered_before_a_step(
    server: TinyServer, world: World, order: tuple[int, ...]
) -> None:
    rows = list(order)
    client = await server.session()
    await client.step(PROMPT)
    output = await client.step(TOKEN[rows], order=order)
    torch.testing.assert_close(output, alone(world, [PROMPT[rows], TOKEN[rows]])[1])


@pytest.mark.parametrize("keep", [0, 1, 2])
async def test_only_the_outputs_that_are_asked_for_come_back(
    server: TinyServer, world: World, keep: int
) -> None:
    client = await server.session()
    output = await client.step(PROMPT, keep=keep)
    assert torch.equal(output, alone(world, [PROMPT])[0][:, 3 - keep :])


async def test_a_mask_hides_padding(server: TinyServer, world: World) -> None:
    client = await server.session()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.uint8)
    output = await client.step(PROMPT, mask=mask)
    assert torch.equal(
        output, world.stage.forward(PROMPT, world.stage.new_cache(START, STOP), attention_mask=mask)
    )


async def test_position_ids_are_used(server: TinyServer, world: World) -> None:
    client = await server.session()
    positions = torch.tensor([[0, 0, 1], [5, 6, 7]])
    output = await client.step(PROMPT, positions=positions)
    expected = world.stage.forward(PROMPT, world.stage.new_cache(START, STOP), position_ids=positions)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
async def test_hidden_states_may_come_in_half_precision(
    server: TinyServer, world: World, dtype: torch.dtype
) -> None:
    client = await server.session()
    output = await client.step(PROMPT.to(dtype))
    assert torch.equal(output, alone(world, [PROMPT.to(dtype).float()])[0])


@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8"])
async def test_hidden_states_may_come_and_go_in_a_codec(
    server: TinyServer, world: World, name: CodecName
) -> None:
    client = await server.session()
    outputs = [await client.step(hidden, travels_as=name, answers=(name,)) for hidden in (PROMPT, TOKEN)]
    wanted = alone(world, [passed(PROMPT, name), passed(TOKEN, name)])
    assert all(
        torch.equal(output, passed(right, name)) for output, right in zip(outputs, wanted, strict=True)
    )


async def test_a_server_tells_which_codecs_it_takes_and_takes_no_other(world: World) -> None:
    server = await started(world, codecs=("bfloat16",))
    client = await server.session()
    assert client.received[-1].message.codecs == ("bfloat16",)
    for wish in ({"travels_as": "int8"}, {"answers": ("int8",)}):
        fault = await fault_of(client.try_step(PROMPT, **wish))  # type: ignore[arg-type]
        assert (fault.code, "none, bfloat16" in fault.message) == ("bad_dtype", True)
    await client.step(PROMPT, travels_as="bfloat16", answers=("bfloat16", "int8"))  # that is for the next one
    await server.close()


async def test_a_step_as_large_as_allowed_is_done(server: TinyServer) -> None:
    client = await server.session()
    output = await client.step(hidden_states(2, MAX_STEP_TOKENS // 2))
    assert output.shape == (2, MAX_STEP_TOKENS // 2, HIDDEN)


async def test_a_refused_step_changes_nothing(server: TinyServer, world: World) -> None:
    client = await server.session()
    await client.step(PROMPT)
    await fault_of(client.try_step(TOKEN * float("nan")))
    assert torch.equal(await client.step(TOKEN), alone(world, [PROMPT, TOKEN])[1])


# the cache


async def test_a_session_that_has_done_nothing_holds_no_cache(server: TinyServer) -> None:
    await server.session()
    assert server.used() == (1, 0, 0)


async def test_a_lease_grows_by_pages(server: TinyServer, world: World) -> None:
    page = PAGE_TOKENS * world.kv_bytes * (STOP - START)
    client = await server.session()
    held = []
    for _ in range(PAGE_TOKENS // 8 + 1):
        await client.step(hidden_states(1, 8))
        held.append(server.service.budget.leased_bytes)
    assert held == [page] * (PAGE_TOKENS // 8) + [2 * page]


async def test_a_lease_is_for_the_blocks_in_use(server: TinyServer, world: World) -> None:
    client = await server.session(start=START, stop=START + 1)
    await client.step(TOKEN[:1])
    assert server.service.budget.leased_bytes == PAGE_TOKENS * world.kv_bytes


async def test_a_lease_shrinks_when_the_session_is_cut_back(server: TinyServer) -> None:
    client = await server.session()
    await client.step(TOKEN[:1])
    one_page = server.service.budget.leased_bytes
    for _ in range(PAGE_TOKENS // 8):
        await client.step(hidden_states(1, 8))
    await client.step(TOKEN[:1], position=1)
    assert server.service.budget.leased_bytes == one_page


async def test_a_lease_returns_when_the_client_leaves(server: TinyServer) -> None:
    client = await server.session()
    await client.step(PROMPT)
    client.close()
    await server.empty()


async def test_a_lease_returns_when_the_client_dies(server: TinyServer) -> None:
    client = await server.session()
    await client.step(PROMPT)
    server.network.kill(server.transports[-1].peer_id)
    await server.empty()


async def test_a_full_cache_makes_a_server_busy(tight: TinyServer) -> None:
    one, two = await tight.session(), await tight.session()
    await one.step(PROMPT)
    assert (await fault_of(two.try_step(TOKEN))).code == "busy"


async def test_a_session_in_a_full_cache_goes_on_within_its_pages(tight: TinyServer, world: World) -> None:
    one, two = await tight.session(), await tight.session()
    await one.step(PROMPT)
    await two.try_step(TOKEN)
    assert torch.equal(await one.step(TOKEN), alone(world, [PROMPT, TOKEN])[1])


async def test_a_full_cache_has_room_again_when_a_session_ends(tight: TinyServer) -> None:
    one, two = await tight.session(), await tight.session()
    await one.step(PROMPT)
    await two.try_step(TOKEN[:1])
    one.close()
    await eventually(lambda: tight.service.num_sessions <= 1, "the first session ends")
    assert isinstance(await two.try_step(TOKEN[:1]), StepDone)


async def test_a_step_whose_client_is_gone_keeps_its_lease_until_it_ends(server: TinyServer) -> None:
    client = await server.session()
    await client.step(PROMPT)
    held = server.service.budget.leased_bytes
    gate = Gate(server)
    step = asyncio.create_task(client.try_step(TOKEN))
    await eventually(lambda: server.engine.waiting, "the step waits in the engine")
    step.cancel()
    client.close()
    assert server.service.budget.leased_bytes == held
    await gate.open()
    await server.empty()


async def test_free_and_total_tokens_are_told(server: TinyServer, world: World) -> None:
    client = await server.client()
    per_token = world.kv_bytes * (STOP - START)
    tokens = 8 * 1024**2 // per_token
    info = await client.ask(GetInfo())
    assert msgspec.structs.replace(info, uptime_s=0.0) == ServerInfo(START, STOP, 0, tokens, tokens, 0, False)


# how many


async def test_no_more_sessions_than_allowed_are_opened(world: World) -> None:
    server = await started(world, max_sessions=1)
    await server.session()
    fault = await fault_of((await server.client()).open())
    assert fault.code == "busy"
    await server.close()


async def test_a_refused_client_may_try_again_on_the_same_stream(server: TinyServer) -> None:
    client = await server.client()
    await fault_of(client.open(stop=STOP + 1))
    assert isinstance(await client.open(), Opened)


async def test_streams_without_a_session_are_not_endless(world: World) -> None:
    server = await started(world, max_sessions=1)
    clients = [await server.client() for _ in range(1 + 64 + 1)]
    assert (await fault_of(clients[-1].answer())).code == "busy"
    await server.close()


# time


async def test_a_stream_on_which_nothing_is_said_is_ended(hasty: TinyServer) -> None:
    client = await hasty.client()
    with pytest.raises(PeerUnreachableError):
        await client.answer()


async def test_a_session_may_be_silent_for_longer_than_a_message(hasty: TinyServer) -> None:
    client = await hasty.session()
    await asyncio.sleep(0.2)
    assert isinstance(await client.try_step(TOKEN), StepDone)


async def test_a_session_that_is_silent_for_too_long_is_ended(world: World) -> None:
    server = await started(world, idle_timeout_s=0.05)
    client = await server.session()
    with pytest.raises(PeerUnreachableError):
        await client.answer()
    await server.empty()
    await server.close()


async def test_a_client_that_does_not_read_its_answers_loses_its_session(world: World) -> None:
    narrow = MemoryNetwork(queue_bytes=64)  # an answer that is not read holds up the next one
    server = await TinyServer(world, small_settings(message_timeout_s=0.1), network=narrow).start()
    client = await server.session()
    for _ in range(3):
        await client.conversation.send(GetInfo())
    await server.empty()
    await server.close()


# leaving


async def test_a_server_that_leaves_opens_no_sessions(server: TinyServer) -> None:
    server.service.leaving = True
    fault = await fault_of((await server.client()).open())
    assert fault.code == "leaving"


async def test_a_server_that_leaves_still_answers_and_says_so(server: TinyServer) -> None:
    client = await server.session()
    server.service.leaving = True
    reply = await client.try_step(TOKEN)
    assert isinstance(reply, StepDone)
    assert reply.leaving


async def test_draining_an_idle_server_takes_no_time(server: TinyServer) -> None:
    assert await server.service.drain(timeout=60)


async def test_draining_waits_for_the_last_session(server: TinyServer) -> None:
    client = await server.session()
    drained = asyncio.create_task(server.service.drain(timeout=60))
    await asyncio.sleep(0)
    client.close()
    assert await drained


async def test_draining_gives_up_after_its_time(server: TinyServer) -> None:
    await server.session()
    assert not await server.service.drain(timeout=0.01)


async def test_draining_can_be_cut_short(server: TinyServer) -> None:
    await server.session()
    drained = asyncio.create_task(server.service.drain(timeout=60))
    await asyncio.sleep(0)
    server.service.stop_waiting()
    assert not await drained


async def test_a_step_behind_a_closed_engine_sends_the_client_elsewhere(server: TinyServer) -> None:
    client = await server.session()
    await asyncio.to_thread(server.engine.close)
    assert (await fault_of(client.try_step(TOKEN))).code == "leaving"


async def test_a_failing_step_is_the_servers_own_fault(
    server: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("out\nof memory")

    client = await server.session()
    monkeypatch.setattr(server.world.stage, "forward_many", fails)
    fault = await fault_of(client.try_step(TOKEN))
    assert (fault.code, "out of memory" in fault.message) == ("internal", True)


async def test_a_session_ends_with_a_failing_step(
    server: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await server.session(max_length=MAX_LENGTH)
    monkeypatch.setattr(server.world.stage, "forward_many", None)
    await fault_of(client.try_step(TOKEN))
    await server.empty()
