"""A limit of tokens per minute and client: what is beyond it is refused until it is not."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from swarmkit.net.protocol.messages import StepDone
from swarmkit.net.rpc.faults import Refusal
from swarmkit.server.quota import ClientQuota

from ..clocks import SetTime
from .test_gradients import TrainingServer
from .worlds import World, fault_of, hidden_states

LIMIT = 60
"""Tokens a minute: one a second."""


@pytest.fixture
def clock() -> SetTime:
    return SetTime()


@pytest.fixture
def quota(clock: SetTime) -> ClientQuota:
    return ClientQuota(clock, LIMIT)


def wait_of(quota: ClientQuota, tokens: int, client: str = "ann") -> float:
    """For how long a client is sent away; 0: it is not."""
    try:
        quota.take(client, tokens)
    except Refusal as refusal:
        return refusal.retry_after_s
    return 0.0


def test_without_a_limit_all_is_taken(clock: SetTime) -> None:
    assert wait_of(ClientQuota(clock), 10**9) == 0


def test_a_client_may_have_the_tokens_of_a_minute_at_once(quota: ClientQuota) -> None:
    assert [wait_of(quota, 30), wait_of(quota, 30)] == [0, 0]


def test_who_has_had_them_is_told_when_to_come_back(quota: ClientQuota, clock: SetTime) -> None:
    quota.take("ann", LIMIT)
    assert wait_of(quota, 15) == pytest.approx(15)
    clock.now += 15
    assert wait_of(quota, 15) == 0


def test_each_client_has_its_own(quota: ClientQuota) -> None:
    quota.take("ann", LIMIT)
    assert wait_of(quota, LIMIT, "bob") == 0


def test_what_is_refused_does_not_count(quota: ClientQuota) -> None:
    quota.take("ann", LIMIT - 5)
    assert wait_of(quota, 10) > 0
    assert wait_of(quota, 5) == 0


def test_a_request_of_more_than_a_minutes_tokens_is_taken_once_and_waited_for_later(
    quota: ClientQuota, clock: SetTime
) -> None:
    assert wait_of(quota, 5 * LIMIT) == 0
    assert wait_of(quota, 1) == pytest.approx(4 * 60 + 1)
    clock.now += 4 * 60 + 1
    assert wait_of(quota, 1) == 0


def test_a_limit_holds_from_the_moment_that_it_is_set(quota: ClientQuota) -> None:
    quota.take("ann", LIMIT)
    quota.per_minute = 2 * LIMIT
    assert wait_of(quota, LIMIT) == 0


def test_clients_that_have_used_nothing_lately_are_forgotten(quota: ClientQuota, clock: SetTime) -> None:
    for number in range(5000):
        quota.take(f"client {number}", 1)
        clock.now += 0.1
    assert len(quota) < 600


@pytest.fixture
async def server(world: World) -> Any:
    server = await TrainingServer(world, client_tokens_per_minute=LIMIT, max_step_tokens=LIMIT).start()
    yield server
    await server.close()


async def test_a_step_beyond_the_limit_is_refused_and_the_session_stays(server: TrainingServer) -> None:
    client = await server.session()
    await client.step(hidden_states(1, LIMIT))
    fault = await fault_of(client.try_step(hidden_states(1, 2)))
    assert (fault.code, f"{LIMIT} tokens a minute" in fault.message) == ("busy", True)
    assert 0 < fault.retry_after_s <= 2
    assert server.service.num_sessions == 1


async def test_another_client_is_served_beside_one_that_has_used_its_own_up(server: TrainingServer) -> None:
    await (await server.session()).step(hidden_states(1, LIMIT))
    other = await server.session()
    assert isinstance(await other.try_step(hidden_states(1, LIMIT)), StepDone)


async def test_training_counts_too(server: TrainingServer) -> None:
    line = await server.line()
    assert isinstance(await line.ask(hidden_states(1, LIMIT)), Tensor)
    fault = await fault_of(line.ask(hidden_states(1, 2)))
    assert fault.code == "busy"
