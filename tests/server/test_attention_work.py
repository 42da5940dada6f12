"""A step of many rows over a long past runs in pieces, between which other clients have their turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch

from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.net.protocol.messages import StepDone
from swarmkit.server.engine.engine import Engine

from ..waiting import eventually
from .worlds import START, STOP, TinyClient, TinyServer, World, hidden_states, same, small_settings

PAST, ROWS = 64, 64
ORDER = (0,) * ROWS
PROMPT = hidden_states(1, PAST)
MANY = hidden_states(ROWS, 1, 1)
TOKEN = hidden_states(1, 1, 2)


@pytest.fixture
async def server(world: World) -> AsyncIterator[TinyServer]:
    settings = small_settings(max_step_tokens=64)
    server = await TinyServer(world, settings, Engine("test", prefill_chunk_tokens=64)).start()
    yield server
    await server.close()


class Passes:
    """The rows of each part of each forward pass; each pass waits to be let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[int]] = []
        self._gate = threading.Semaphore(0)
        forward_many = Stage.forward_many

        def watched(stage: Stage, parts: list[StepPart]) -> list[torch.Tensor | Exception]:
            self.rows.append([part.hidden.shape[0] for part in parts])
            assert self._gate.acquire(timeout=60)
            return forward_many(stage, parts)

        monkeypatch.setattr(Stage, "forward_many", watched)

    def let_through(self, passes: int = 1000) -> None:
        self._gate.release(passes)


async def many_rows(server: TinyServer) -> TinyClient:
    """A client whose next step is of many rows."""
    client = await server.session(max_length=128)
    await client.step(PROMPT)
    return client


def wanted(world: World, hidden: torch.Tensor) -> torch.Tensor:
    cache = world.stage.new_cache(START, STOP)
    world.stage.forward(PROMPT, cache)
    cache.edit(PAST, ORDER)
    return world.stage.forward(hidden, cache)


async def test_it_yields_what_it_does_as_a_whole(
    server: TinyServer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await many_rows(server)
    passes = Passes(monkeypatch)
    passes.let_through()
    output = await client.step(MANY, order=ORDER)
    assert len(passes.rows) > 2
    assert sum(map(sum, passes.rows)) == ROWS
    assert same(output, wanted(world, MANY))


async def test_another_clients_token_waits_for_one_piece_at_most(
    server: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    heavy, light = await many_rows(server), await server.session()
    await light.step(TOKEN)
    passes = Passes(monkeypatch)
    step = asyncio.create_task(heavy.try_step(MANY, order=ORDER))
    await eventually(lambda: len(passes.rows) == 1, "the first piece runs")
    token = asyncio.create_task(light.try_step(TOKEN))
    await eventually(lambda: server.engine.holds == 2, "the token waits")
    passes.let_through(2)
    assert isinstance(await token, StepDone)
    assert not step.done()
    passes.let_through()
    assert isinstance(await step, StepDone)


async def test_a_client_that_leaves_amid_the_pieces_leaves_nothing_behind(
    server: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await many_rows(server)
    passes = Passes(monkeypatch)
    step = asyncio.create_task(client.try_step(MANY, order=ORDER))
    await eventually(lambda: len(passes.rows) == 1, "the first piece runs")
    client.close()
    passes.let_through()
    await asyncio.gather(step, return_exceptions=True)
    await server.empty()


async def test_a_session_goes_on_after_a_step_in_pieces(server: TinyServer, world: World) -> None:
    client = await many_rows(server)
    await client.step(MANY, order=ORDER)
    again = await client.step(MANY)
    server.used()  # audits what is leased
    cache = world.stage.new_cache(START, STOP)
    world.stage.forward(PROMPT, cache)
    cache.edit(PAST, ORDER)
    world.stage.forward(MANY, cache)
    assert same(again, world.stage.forward(MANY, cache))


async def test_work_counts_for_the_share_of_a_client(server: TinyServer) -> None:
    """The queue is as long as its work, not as its tokens."""
    client = await many_rows(server)
    busy, gate = threading.Event(), threading.Event()
    held = asyncio.create_task(server.engine.run(lambda: (busy.set(), gate.wait())))
    await asyncio.to_thread(busy.wait)
    step = asyncio.create_task(client.try_step(MANY, order=ORDER))
    await eventually(lambda: server.engine.holds == 2, "the step waits")
    long = server.engine.ahead(1, 60).wait_s
    expected = server.engine.learned_of(server.world.stage).times.of(60)  # as measured by now
    gate.set()
    await asyncio.gather(held, step)
    assert long >= expected * 0.5
