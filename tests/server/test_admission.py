"""How long others are waited for, when a full server has room again, and who makes some."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from swarmkit.errors import PeerUnreachableError
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.net.protocol.messages import GetInfo, GetResources, Resources, ServerInfo, StepDone
from swarmkit.net.rpc.receive_budget import ReceiveReservation
from swarmkit.server.engine.admission_policy import (
    LEAST_RETRY_S,
    MOST_RETRY_S,
    Holding,
    Tenures,
    expected_wait_s,
    retry_after_s,
    to_evict,
)
from swarmkit.server.engine.scheduler import PassTimes

from ..waiting import eventually
from .test_service import Gate
from .worlds import START, STOP, TinyServer, World, alone, fault_of, hidden_states, small_settings

CHUNK = 512
READING_S, TOKEN_S = 0.02, 0.001


def times_learnt() -> PassTimes:
    times = PassTimes()
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        times.learn(tokens, READING_S + tokens * TOKEN_S)
    return times


TIMES = times_learnt()


def wait_s(tokens: int, *ahead: int) -> float:
    return expected_wait_s(tokens, tokens <= 16, ahead, TIMES, CHUNK)


# how long others are waited for


def test_nobody_waits_for_nobody() -> None:
    assert wait_s(1) == wait_s(1000) == 0


def test_nothing_is_expected_before_anything_was_measured() -> None:
    assert expected_wait_s(1000, False, [1000], PassTimes(), CHUNK) == 0


@pytest.mark.parametrize("ahead", [CHUNK, 100 * CHUNK])
def test_a_decode_step_waits_for_one_forward_pass_however_long_the_queue(ahead: int) -> None:
    assert wait_s(1, ahead) == pytest.approx(READING_S + CHUNK * TOKEN_S)


def test_a_long_step_waits_for_as_much_of_each_other_one_as_it_has_itself() -> None:
    assert wait_s(2 * CHUNK, 100 * CHUNK) == pytest.approx(2 * (READING_S + CHUNK * TOKEN_S))


def test_a_long_step_waits_for_all_that_is_left_of_shorter_ones() -> None:
    assert wait_s(100 * CHUNK, CHUNK // 2, CHUNK // 2) == pytest.approx(READING_S + CHUNK * TOKEN_S)


# when there is room again


@pytest.mark.parametrize(
    ("seconds", "told"), [(-1, LEAST_RETRY_S), (0, LEAST_RETRY_S), (5, 5), (1e9, MOST_RETRY_S)]
)
def test_clients_are_told_a_time_within_bounds(seconds: float, told: float) -> None:
    assert retry_after_s(seconds) == told


def test_of_many_sessions_one_ends_soon() -> None:
    tenures = Tenures()
    tenures.ended(20.0)
    assert (tenures.next_end_s(1), tenures.next_end_s(10)) == (20.0, 2.0)


def test_what_is_usual_follows_what_happens() -> None:
    tenures = Tenures()
    for _ in range(100):
        tenures.ended(20.0)
    for _ in range(100):
        tenures.ended(4.0)
    assert tenures.next_end_s(1) == pytest.approx(4.0, abs=0.1)


# who makes room


def holding(key: str, idle_s: float, nbytes: int = 10) -> Holding:
    return Holding(key, nbytes, idle_s)


@pytest.mark.parametrize(
    ("needed", "evicted"), [(1, ["oldest"]), (10, ["oldest"]), (11, ["oldest", "old"]), (21, [])]
)
def test_the_longest_idle_go_first_and_none_in_vain(needed: int, evicted: list[str]) -> None:
    holdings = [holding("young", 5), holding("oldest", 100), holding("old", 50)]
    assert to_evict(holdings, needed, 15) == evicted


def test_who_holds_nothing_stays() -> None:
    assert to_evict([holding("empty", 100, 0), holding("full", 50)], 1, 15) == ["full"]


# on a server


PAGE = hidden_states(1, 8, 1)
TOKEN = hidden_states(1, 1, 2)


async def started(world: World, **settings: Any) -> TinyServer:
    return await TinyServer(world, small_settings(**settings)).start()


def one_page(world: World) -> int:
    return PAGE_TOKENS * world.kv_bytes * (STOP - START)


@pytest.fixture
async def tight(world: World) -> AsyncIterator[TinyServer]:
    """A server with room for one page, which whoever is idle loses at once."""
    server = await started(world, cache_bytes=one_page(world), evict_after_s=0)
    yield server
    await server.close()


async def test_a_full_cache_says_when_to_come_back(world: World) -> None:
    server = await started(world, cache_bytes=one_page(world))
    one, two = await server.session(), await server.session()
    await one.step(TOKEN)
    fault = await fault_of(two.try_step(TOKEN))
    assert LEAST_RETRY_S <= fault.retry_after_s <= MOST_RETRY_S
    await server.close()


async def test_an_idle_session_makes_room_and_is_told(tight: TinyServer, world: World) -> None:
    one, two = await tight.session(), await tight.session()
    await one.step(TOKEN)
    output = await two.step(TOKEN)
    fault = await fault_of(one.answer())
    assert torch.equal(output, alone(world, [TOKEN])[0])
    assert (fault.code, fault.number) == ("busy", 0)
    with pytest.raises(PeerUnreachableError):
        await one.answer()
    assert tight.used() == (1, one_page(world), 0)


async def test_a_session_whose_step_runs_makes_no_room(tight: TinyServer) -> None:
    one, two = await tight.session(), await tight.session()
    gate = Gate(tight)
    step = asyncio.create_task(one.try_step(TOKEN))
    await eventually(lambda: tight.engine.waiting, "the step waits in the engine")
    assert (await fault_of(two.try_step(TOKEN))).code == "busy"
    await gate.open()
    assert isinstance(await step, StepDone)


async def test_an_idle_session_gives_its_place_to_another(world: World) -> None:
    server = await started(world, max_sessions=1, evict_after_s=0)
    one = await server.session()
    await server.session()
    assert (await fault_of(one.answer())).code == "busy"
    await server.close()


async def waiting_step(server: TinyServer, **options: Any) -> Any:
    """What a step of eight tokens is told that comes while as long a one waits, and a pass takes a second."""
    server.engine.learned_of(server.world.stage).times.learn(8, 1.0)
    server.engine.learned_of(server.world.stage).times.learn(16, 1.0)
    gate = Gate(server)
    await eventually(
        lambda: server.engine.holds >= 1 and not server.engine.waiting, "the gate holds the engine"
    )
    first, second = await server.session(), await server.session()
    ahead = asyncio.create_task(first.try_step(PAGE))
    await eventually(lambda: server.engine.waiting >= 1, "the step ahead waits")
    asked = asyncio.create_task(second.try_step(PAGE, **options))
    done, _ = await asyncio.wait([asked], timeout=0.2)
    asking = await server.client()
    info = await asking.ask(GetInfo())
    await gate.open()
    await ahead
    return bool(done), await asked, info


async def test_a_step_that_would_wait_too_long_is_refused_at_once(world: World) -> None:
    server = await started(world, max_queue_s=0.5)
    at_once, fault, _ = await waiting_step(server)
    assert at_once
    assert (fault.code, fault.retry_after_s) == ("busy", pytest.approx(0.5))
    await server.close()


async def test_a_step_is_refused_at_once_that_would_wait_for_longer_than_its_client(world: World) -> None:
    server = await started(world)
    at_once, fault, _ = await waiting_step(server, patience_s=0.25)
    assert at_once
    assert (fault.code, fault.retry_after_s) == ("busy", pytest.approx(0.75))
    await server.close()


async def test_a_step_learns_how_many_were_ahead_and_the_wait_that_was_expected(world: World) -> None:
    server = await started(world)
    _, done, info = await waiting_step(server)
    assert isinstance(done, StepDone)
    assert (done.ahead, done.expected_ms) == (2, pytest.approx(1000))  # the gate and a step
    assert isinstance(info, ServerInfo)
    assert (info.waiting, info.expected_wait_ms) == (3, pytest.approx(1000))
    await server.close()


async def test_a_large_step_waits_for_room_no_longer_than_allowed(world: World) -> None:
    server = await started(world, max_admission_wait_s=0.01, max_step_tokens=2**14, max_session_length=2**15)
    receive_budget = server.service.receive_budget
    await receive_budget.take(receive_budget.capacity_bytes, ReceiveReservation(receive_budget))
    client = await server.session(max_length=2**15)
    fault = await fault_of(client.try_step(hidden_states(1, 2**14)))
    assert fault.code == "busy"
    assert fault.retry_after_s >= LEAST_RETRY_S
    await server.close()


async def test_a_census_is_taken_only_where_the_owner_wants_one(world: World, server: TinyServer) -> None:
    assert (await fault_of((await server.client()).ask(GetResources()))).code == "illegal_message"
    counting = await started(world, report_resources=True)
    one = await counting.session()
    await one.step(TOKEN)
    census = await (await counting.client()).ask(GetResources())
    assert isinstance(census, Resources)
    assert (census.sessions, census.streams, census.accounted) == (1, 2, True)
    assert census.leased_bytes == one_page(world)
    await counting.close()
