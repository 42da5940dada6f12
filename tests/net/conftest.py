"""Networks to test in: each fixture comes once in memory and once over libp2p."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from swarmkit.net.transport.seam import Transport

from .worlds import WORLDS, Lent


@pytest_asyncio.fixture(params=sorted(WORLDS), loop_scope="module")
async def world(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A network of the test's own."""
    world = WORLDS[request.param]()
    yield world
    await world.close()


@pytest_asyncio.fixture(params=sorted(WORLDS), scope="module", loop_scope="module")
async def three_peers(request: pytest.FixtureRequest) -> AsyncIterator[Sequence[Transport]]:
    world = WORLDS[request.param]()
    yield [await world.peer() for _ in range(3)]
    await world.close()


@pytest.fixture
def shared(three_peers: Sequence[Transport]) -> Lent:
    """Three peers of a network that other tests use too: neither end them nor expect an empty table."""
    return Lent(three_peers)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of the test's own."""
    return f"key of {request.node.name}"
