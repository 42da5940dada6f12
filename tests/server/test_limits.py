"""Limits that are replaced while a server runs are in force with the next step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.kv.page_table import PAGE_TOKENS
from swarmkit.net.protocol.messages import Fault, StepDone
from swarmkit.net.transport.paced import PacedTransport
from swarmkit.net.transport.rates import Rates
from swarmkit.node.server import Server
from swarmkit.server.cache.kv_budget import CacheFullError, KVBudget
from swarmkit.settings import Limits

from ..waiting import eventually
from .worlds import START, STOP, TinyServer, World, alone, fault_of, hidden_states, small_settings

PAGE = hidden_states(1, PAGE_TOKENS)
TOKEN = hidden_states(1, 1)


@pytest.fixture
async def server(world: World) -> AsyncIterator[TinyServer]:
    """A server with room for four pages."""
    settings = small_settings(cache_bytes=4 * one_page(world), max_step_tokens=PAGE_TOKENS)
    server = await TinyServer(world, settings).start()
    yield server
    await server.close()


def one_page(world: World) -> int:
    return PAGE_TOKENS * world.kv_bytes * (STOP - START)


def limits(**changes: Any) -> Limits:
    return small_settings().limits.replace(**changes)


# the budget


def test_a_budget_that_shrinks_below_its_leases_lets_none_grow() -> None:
    budget = KVBudget(4 * PAGE_TOKENS)
    lease = budget.lease(1)
    lease.resize(1, 3 * PAGE_TOKENS)
    budget.set_capacity(2 * PAGE_TOKENS)
    with pytest.raises(CacheFullError) as error:
        lease.grow(1, 4 * PAGE_TOKENS)
    assert (error.value.lacking_bytes, budget.overdrawn_bytes) == (2 * PAGE_TOKENS, PAGE_TOKENS)
    budget.audit()


def test_a_budget_that_shrank_gives_out_nothing_until_its_leases_fit() -> None:
    budget = KVBudget(4 * PAGE_TOKENS)
    large, small = budget.lease(1), budget.lease(1)
    large.resize(1, 3 * PAGE_TOKENS)
    budget.set_capacity(2 * PAGE_TOKENS)
    large.resize(1, 2 * PAGE_TOKENS)
    with pytest.raises(CacheFullError):
        small.resize(1, PAGE_TOKENS)
    large.resize(1, PAGE_TOKENS)
    small.resize(1, PAGE_TOKENS)
    budget.audit()


def test_a_budget_that_grows_lends_the_rest_at_once() -> None:
    budget = KVBudget(PAGE_TOKENS)
    budget.set_capacity(2 * PAGE_TOKENS)
    budget.lease(1).resize(1, 2 * PAGE_TOKENS)
    assert budget.free_bytes == 0
    budget.audit()


# sessions and their cache


async def test_more_sessions_than_the_new_limit_are_refused(server: TinyServer) -> None:
    await server.session()
    server.service.set_limits(limits(max_sessions=1))
    reply = await (await server.client()).open()
    assert isinstance(reply, Fault)
    assert reply.code == "busy"


async def test_sessions_beyond_the_new_limit_end_the_longest_idle_first(server: TinyServer) -> None:
    first, second = await server.session(), await server.session()
    await first.step(TOKEN)
    await second.step(TOKEN)
    server.service.set_limits(limits(max_sessions=1))
    assert (await fault_of(first.answer())).code == "busy"
    await second.step(TOKEN)
    assert server.service.num_sessions == 1


async def test_a_smaller_cache_ends_the_session_that_is_longest_idle(
    server: TinyServer, world: World
) -> None:
    first, second = await server.session(), await server.session()
    await first.step(PAGE)
    await second.step(PAGE)
    server.service.set_limits(limits(cache_bytes=one_page(world)))
    assert (await fault_of(first.answer())).code == "busy"
    assert server.used() == (1, one_page(world), 0)


async def test_a_session_that_fits_the_smaller_cache_goes_on_and_cannot_grow_beyond_it(
    server: TinyServer, world: World
) -> None:
    one = await server.session()
    half = PAGE[:, : PAGE_TOKENS // 2]
    before = await one.step(half)
    server.service.set_limits(limits(cache_bytes=one_page(world)))
    after = await one.step(half)
    assert (await fault_of(one.try_step(TOKEN))).code == "busy"
    wanted = alone(world, [half, half])
    assert torch.equal(torch.cat([before, after], 1), torch.cat(wanted, 1))


async def test_a_step_that_runs_is_finished_when_the_cache_shrinks(server: TinyServer, world: World) -> None:
    one = await server.session()
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold() -> None:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10)

    held = asyncio.create_task(server.engine.run(hold))
    await eventually(lambda: server.engine.holds and not server.engine.waiting, "the job that holds runs")
    step = asyncio.create_task(one.try_step(PAGE))
    await eventually(lambda: server.engine.waiting, "the step waits")
    server.service.set_limits(limits(cache_bytes=1))
    gate.set()
    await held
    assert isinstance(await step, StepDone)
    assert (await fault_of(one.try_step(TOKEN))).code == "busy"


# threads


async def test_the_next_step_runs_on_the_new_number_of_threads(
    server: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, seen = server.world.stage, []
    forward = stage.forward_many

    def watched(parts: Any) -> Any:
        seen.append(torch.get_num_threads())
        return forward(parts)

    monkeypatch.setattr(stage, "forward_many", watched)
    one = await server.session()
    await one.step(TOKEN)
    for threads in (3, 2, None):
        server.engine.set_pace(threads, 1.0)
        await one.step(TOKEN)
    assert seen == [seen[0], 3, 2, seen[0]]


# rates


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_the_next_step_is_sent_and_received_at_the_new_rate(world: World, direction: str) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    rates = Rates(lambda: sum(waited), sleep)
    server = TinyServer(world, small_settings(max_step_tokens=512, max_session_length=512))
    await server.start(PacedTransport(server.network.transport(), rates))
    one = await server.session(max_length=512)
    await one.step(TOKEN)
    assert waited == []
    rates.replace(*((1000.0, None) if direction == "up" else (None, 1000.0)))
    long = hidden_states(1, 500)
    await one.step(long)
    burst, heads = 16 * 1024, 1000
    assert 0 <= sum(waited) * 1000 - (long.nbytes - burst) <= heads
    await server.transport.close()
    await server.close()


# a whole server


@pytest.fixture
def swarm(world: World) -> Iterator[LocalSwarm]:
    with LocalSwarm(world.checkpoint, 1, transport="memory") as swarm:
        yield swarm


def only(swarm: LocalSwarm) -> Server:
    [server] = swarm.servers
    assert isinstance(server, Server)
    return server


def test_a_server_says_which_limits_are_in_force(swarm: LocalSwarm) -> None:
    server = only(swarm)
    wanted = server.limits.replace(max_sessions=2, cache_bytes=10**6, activation_cache_bytes=0)
    server.set_limits(wanted)
    assert server.limits == wanted


def test_a_session_of_a_client_goes_on_under_new_limits_with_the_same_tokens(swarm: LocalSwarm) -> None:
    model, server = swarm.model(), only(swarm)
    prompt = torch.arange(5)[None]
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False)
    server.set_limits(server.limits.replace(max_sessions=1, upload_bytes_per_s=1e6, download_bytes_per_s=1e6))
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), wanted)


def test_activations_beyond_the_new_limit_are_dropped_and_computed_again(swarm: LocalSwarm) -> None:
    model, server = swarm.model(), only(swarm)
    gradients = server.serving.gradients
    assert gradients is not None

    def gradient(*, drop: bool) -> torch.Tensor:
        embeddings = model.get_input_embeddings()(torch.arange(5)[None]).detach().requires_grad_()
        output = model(inputs_embeds=embeddings).logits
        assert gradients.kept.nbytes > 0
        if drop:
            server.set_limits(server.limits.replace(activation_cache_bytes=0))
            assert gradients.kept.nbytes == 0
        output.sum().backward()
        assert embeddings.grad is not None
        return embeddings.grad

    assert torch.equal(gradient(drop=False), gradient(drop=True))
