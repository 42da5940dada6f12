"""Many clients of one server: each gets what it would get alone, whatever the others do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch

from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.server.engine.engine import Engine

from ..waiting import eventually
from .worlds import START, STOP, TinyClient, TinyServer, World, alone, hidden_states, same, small_settings

CHUNK = 8
CLIENTS = 6


@pytest.fixture
async def server(world: World) -> AsyncIterator[TinyServer]:
    """A server that cuts steps of more than a decode step's tokens into chunks of eight."""
    settings = small_settings(max_step_tokens=64)
    server = await TinyServer(world, settings, Engine("test", prefill_chunk_tokens=CHUNK)).start()
    yield server
    await server.close()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens of each part of each forward pass."""
    ran: list[list[int]] = []
    forward_many = Stage.forward_many

    def watched(stage: Stage, parts: list[StepPart]) -> list[torch.Tensor | Exception]:
        ran.append([part.hidden.shape[1] for part in parts])
        return forward_many(stage, parts)

    monkeypatch.setattr(Stage, "forward_many", watched)
    return ran


async def all_at_once(server: TinyServer, *steps: tuple[TinyClient, torch.Tensor]) -> list[torch.Tensor]:
    """One step of each client, all of which reach the engine before it takes the first."""
    entered, gate = threading.Event(), threading.Event()
    busy = asyncio.create_task(server.engine.run(lambda: (entered.set(), gate.wait())))
    await asyncio.to_thread(entered.wait)
    tasks = [asyncio.create_task(client.step(hidden)) for client, hidden in steps]
    await eventually(lambda: server.engine.waiting >= len(steps), "all steps wait in the engine")
    gate.set()
    await busy
    return list(await asyncio.gather(*tasks))


async def leave_amid_a_prompt(client: TinyClient, passes: list[list[int]]) -> None:
    """Go as soon as the first part of a long prompt is under way, whatever its size.

    One token may be somebody else's.
    """
    before = len(passes)
    step = asyncio.create_task(client.step(hidden_states(1, 60)))
    await eventually(lambda: sum(map(sum, passes[before:])) > 1 or step.done(), "the first part begins")
    assert not step.done(), "it was refused, or was over at once"
    client.close()
    await asyncio.gather(step, return_exceptions=True)


async def test_steps_of_several_clients_go_through_the_blocks_together(
    server: TinyServer, passes: list[list[int]]
) -> None:
    clients = [await server.session() for _ in range(3)]
    steps = [hidden_states(1, tokens) for tokens in (1, 5, 2)]
    await all_at_once(server, *zip(clients, steps, strict=True))
    assert [sorted(tokens) for tokens in passes] == [[1, 2, 5]]


async def test_each_of_many_clients_gets_what_it_would_get_alone(server: TinyServer, world: World) -> None:
    clients = [await server.session() for _ in range(CLIENTS)]
    lengths = [(3 + 4 * number, 1, 1, 2, 1) for number in range(CLIENTS)]
    inputs = [
        [hidden_states(1 + number % 2, tokens, 10 * number + tokens) for tokens in lengths[number]]
        for number in range(CLIENTS)
    ]
    outputs = [
        await all_at_once(server, *zip(clients, steps, strict=True)) for steps in zip(*inputs, strict=True)
    ]
    for given, got in zip(inputs, zip(*outputs, strict=True), strict=True):
        assert all(map(same, got, alone(world, given)))


async def test_a_long_prompt_in_chunks_is_the_prompt_as_a_whole(
    server: TinyServer, world: World, passes: list[list[int]]
) -> None:
    prompt, token = hidden_states(2, 20), hidden_states(2, 1)
    client = await server.session()
    outputs = [await client.step(prompt), await client.step(token)]
    in_chunks, passes[:] = list(passes), []
    assert in_chunks == [[4]] * 5 + [[1]]
    assert all(map(same, outputs, alone(world, [prompt, token])))


async def test_a_padded_prompt_in_chunks_is_the_prompt_as_a_whole(server: TinyServer, world: World) -> None:
    prompt = hidden_states(2, 20)
    mask = torch.ones(2, 20, dtype=torch.uint8)
    mask[0, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    client = await server.session()
    output = await client.step(prompt, mask=mask, positions=positions)
    options = {"attention_mask": mask, "position_ids": positions}
    wanted = world.stage.forward(prompt, world.stage.new_cache(START, STOP), **options)
    real = mask[..., None].bool()
    assert same(output * real, wanted * real)


async def test_a_client_that_leaves_amid_its_prompt_does_not_disturb_the_others(
    server: TinyServer, world: World, passes: list[list[int]]
) -> None:
    leaving, staying = await server.session(), await server.session()
    prompt, token = hidden_states(1, 6), hidden_states(1, 1)
    outputs = [await staying.step(prompt)]
    step = asyncio.create_task(staying.step(token))
    await leave_amid_a_prompt(leaving, passes)
    outputs.append(await step)
    assert all(map(same, outputs, alone(world, [prompt, token])))


async def test_a_client_that_leaves_amid_its_prompt_leaves_nothing_behind(
    server: TinyServer, passes: list[list[int]]
) -> None:
    await leave_amid_a_prompt(await server.session(), passes)
    await server.empty()
    assert server.engine.waiting == 0


@pytest.mark.parametrize("tokens", [1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1])
async def test_a_session_takes_no_more_memory_than_it_leases(server: TinyServer, tokens: int) -> None:
    client = await server.session(max_length=128)
    for step in (tokens, 1, 5):
        await client.step(hidden_states(1, step))
        (session,) = server.service.sessions
        layers = session.cache.blocks
        taken = sum(
            part.untyped_storage().nbytes() for layer in layers for part in (layer.keys, layer.values)
        )
        assert taken <= server.used()[1]
