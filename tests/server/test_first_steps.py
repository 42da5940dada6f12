"""A session's first step may be its only one, as that of a trial: it lets the engine expect no other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from typing import Any

import pytest

from swarmkit.server.engine.scheduler import ArrivalPredictor

from ..waiting import eventually
from .worlds import TinyServer, World, hidden_states, small_settings

TOKEN = hidden_states(1, 1)


@pytest.fixture
async def server(world: World) -> AsyncIterator[TinyServer]:
    server = await TinyServer(world, small_settings()).start()
    yield server
    await server.close()


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> list[Hashable]:
    """The sessions of which the engine expects another step."""
    sessions: list[Hashable] = []
    decoded = ArrivalPredictor.decoded

    def watched(predictor: ArrivalPredictor, session: Hashable, *args: Any) -> None:
        sessions.append(session)
        decoded(predictor, session, *args)

    monkeypatch.setattr(ArrivalPredictor, "decoded", watched)
    return sessions


async def test_a_first_token_holds_up_no_prompt_of_others(
    server: TinyServer, expected: list[Hashable]
) -> None:
    trial, session = await server.session(max_length=16), await server.session(max_length=16)
    await trial.step(TOKEN)
    await session.step(TOKEN)
    await session.step(TOKEN)
    await eventually(lambda: expected, "another step of the session is expected")
    assert len(expected) == 1  # the engine's thread would have told of the first steps before
