"""A lease is for the pages that a session's rows really have, and is there before the memory is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.kv.page_table import pages_for

from .worlds import (
    MAX_STEP_TOKENS,
    START,
    STOP,
    TinyClient,
    TinyServer,
    World,
    fault_of,
    hidden_states,
    small_settings,
)

LENGTH = PAGE_TOKENS + 8
BEAMS = (0, 0, 0)


def page_bytes(world: World) -> int:
    return PAGE_TOKENS * world.kv_bytes * (STOP - START)


def leased_pages(server: TinyServer) -> float:
    """What all sessions have leased, which the audit of `used` has compared with what they hold."""
    return server.used()[1] / page_bytes(server.world)


async def holding(server: TinyServer, rows: int = 1, length: int = LENGTH) -> TinyClient:
    """A session of so many tokens."""
    client = await server.session(max_length=128)
    while client.position < length:
        tokens = min(length - client.position, MAX_STEP_TOKENS // rows)
        await client.step(hidden_states(rows, tokens, client.position))
    return client


async def beams(server: TinyServer) -> TinyClient:
    """A session of three rows that have their first page in common, and have gone on by a token."""
    client = await holding(server)
    await client.step(hidden_states(3, 1, 7), order=BEAMS)
    return client


@pytest.fixture
async def small(world: World) -> AsyncIterator[TinyServer]:
    """A server with room for eleven pages."""
    settings = small_settings(cache_bytes=11 * page_bytes(world))
    server = await TinyServer(world, settings).start()
    yield server
    await server.close()


async def test_rows_that_are_repeated_lease_their_common_page_once(server: TinyServer) -> None:
    await beams(server)
    assert leased_pages(server) == 1 + len(BEAMS)


async def test_rows_that_are_not_lease_theirs_each(server: TinyServer) -> None:
    await holding(server, rows=3)
    assert leased_pages(server) == 3 * pages_for(LENGTH)


async def test_dropped_rows_return_their_pages(server: TinyServer) -> None:
    client = await beams(server)
    await client.step(hidden_states(1, 1), order=(2,))
    assert leased_pages(server) == pages_for(LENGTH)


async def test_a_rollback_returns_pages(server: TinyServer) -> None:
    client = await beams(server)
    for seed in range(2 * PAGE_TOKENS // 5):
        await client.step(hidden_states(3, 5, seed))
    long = leased_pages(server)
    await client.step(hidden_states(3, 1), position=LENGTH)
    # The rows share the first page only: what follows it, each has computed for itself.
    assert (long, leased_pages(server)) == (1 + 3 * 3, 1 + 3)


async def test_a_step_leases_what_it_may_take_before_it_runs(server: TinyServer) -> None:
    client = await holding(server)
    (session,) = server.service.sessions
    seen = []
    before_step = session.cache.before_step

    def look(tokens: int) -> None:
        before_step(tokens)
        seen.append((session.lease.nbytes, session.cache.nbytes()))

    session.cache.before_step = look  # type: ignore[method-assign]
    await client.step(hidden_states(3, 1), order=BEAMS)
    gathered = 3 * pages_for(LENGTH) * page_bytes(server.world) / (STOP - START)
    assert [leased >= held + gathered for leased, held in seen] == [True]


@pytest.mark.parametrize("end", ["close", "kill"])
async def test_pages_return_when_their_session_ends(server: TinyServer, end: str) -> None:
    client = await beams(server)
    if end == "close":
        client.close()
    else:
        server.network.kill(server.transports[-1].peer_id)
    async with asyncio.timeout(30):
        await server.empty()
    assert server.service.budget.free_bytes == server.service.budget.capacity_bytes


async def test_a_row_cannot_be_repeated_beyond_the_memory_of_the_server(small: TinyServer) -> None:
    client = await holding(small)
    fault = await fault_of(client.try_step(hidden_states(16, 1), order=(0,) * 16))
    assert (fault.code, leased_pages(small)) == ("busy", pages_for(LENGTH))


async def test_beams_fit_where_copies_of_their_prompt_would_not(small: TinyServer) -> None:
    length = 3 * PAGE_TOKENS + 1
    assert len(BEAMS) * pages_for(length) * page_bytes(small.world) > small.service.budget.capacity_bytes
    client = await holding(small, length=length)
    await client.step(hidden_states(3, 1), order=BEAMS)
    assert leased_pages(small) == 3 + len(BEAMS)
