"""The engine expects no further step of a session that has ended, such as that of a trial."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from swarmkit.server.engine.scheduler import ExpectedArrivals

from ..waiting import eventually
from .worlds import TinyServer, World, hidden_states, small_settings

TOKEN = hidden_states(1, 1)
NOBODY = ExpectedArrivals()


@pytest.fixture
async def server(world: World) -> AsyncIterator[TinyServer]:
    server = await TinyServer(world, small_settings()).start()
    yield server
    await server.close()


async def expected(server: TinyServer) -> ExpectedArrivals:
    """The steps that the engine expects, as its own thread finds."""
    arrivals = server.engine.learned_of(server.world.stage).arrivals
    return (await server.engine.run(lambda: arrivals.expected(server.engine.now()))).value


async def test_after_its_first_token_a_session_is_expected_to_go_on(server: TinyServer) -> None:
    session = await server.session(max_length=16)
    await session.step(TOKEN)
    assert (await expected(server)).tokens == 1


@pytest.mark.parametrize("steps", [1, 3])
async def test_nothing_is_expected_of_a_session_that_has_ended(server: TinyServer, steps: int) -> None:
    session = await server.session(max_length=16)
    for _ in range(steps):
        await session.step(TOKEN)
    session.close()
    await server.empty()
    assert await expected(server) == NOBODY


async def test_the_end_of_one_session_leaves_others_expected(server: TinyServer) -> None:
    trial, session = await server.session(max_length=16), await server.session(max_length=16)
    await trial.step(TOKEN)
    await session.step(TOKEN)
    trial.close()
    await eventually(lambda: server.service.num_sessions == 1, "the trial has ended")
    assert (await expected(server)).tokens == 1


async def test_sessions_that_end_without_a_step_are_not_remembered_for_ever(server: TinyServer) -> None:
    arrivals = server.engine.learned_of(server.world.stage).arrivals
    for number in range(3000):
        arrivals.end(number)
    assert arrivals.num_ended <= 1024
