"""Sessions that begin like an earlier one: what is kept is not computed again, and outputs are the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.kv.pages import names_of
from swarmkit.net.protocol.messages import SESSION, Fault, Opened, PrefixRestored, RestorePrefix
from swarmkit.net.rpc.message_stream import MessageStream
from swarmkit.server.cache.prefix_cache import root_of
from swarmkit.server.cache.prefix_tracker import tail_bytes
from swarmkit.server.engine.engine import Engine

from ..waiting import eventually
from .worlds import (
    HIDDEN,
    START,
    STOP,
    TinyClient,
    TinyServer,
    World,
    alone,
    hidden_states,
    same,
    small_settings,
)

PAGES = 3
PROMPT = hidden_states(1, PAGES * PAGE_TOKENS + 5)
LONG = {"max_length": 512}

Make = Callable[..., Any]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each part that went through the blocks."""
    ran: list[int] = []
    forward_many = Stage.forward_many

    def watched(stage: Stage, parts: list[StepPart]) -> list[torch.Tensor | Exception]:
        ran.extend(part.hidden.shape[0] * part.hidden.shape[1] for part in parts)
        return forward_many(stage, parts)

    monkeypatch.setattr(Stage, "forward_many", watched)
    return ran


@pytest.fixture
async def make(world: World) -> AsyncIterator[Make]:
    servers: list[TinyServer] = []

    async def one(prefix_cache: str = "everyone", **changes: Any) -> TinyServer:
        settings = small_settings(
            prefix_cache=prefix_cache, max_step_tokens=256, max_session_length=512, **changes
        )
        servers.append(await TinyServer(world, settings, Engine("test")).start())
        return servers[-1]

    yield one
    for server in servers:
        await server.close()


@pytest.fixture
async def server(make: Make) -> TinyServer:
    found: TinyServer = await make()
    return found


async def another_session_of(server: TinyServer, client_transport: Any) -> TinyClient:
    stream = await client_transport.open(
        server.transport.peer_id, SESSION.endpoint, server.transport.addresses
    )
    client = TinyClient(MessageStream(stream, SESSION, 2**24), server.world.checkpoint.fingerprint)
    assert isinstance(await client.open(**LONG), Opened)
    return client


async def after(server: TinyServer, *steps: torch.Tensor, **options: Any) -> None:
    """Somebody has taken these steps and left."""
    client = await server.session(**LONG)
    for step in steps:
        await client.step(step, **options)
    client.close()
    await server.empty()


async def test_what_an_earlier_session_began_with_is_not_computed_again(
    server: TinyServer, computed: list[int]
) -> None:
    await after(server, PROMPT)
    computed.clear()
    await (await server.session(**LONG)).step(PROMPT)
    assert computed == [5]


async def test_outputs_are_those_of_a_session_alone(server: TinyServer, world: World) -> None:
    await after(server, PROMPT)
    client = await server.session(**LONG)
    steps = [PROMPT, hidden_states(1, 1, 7)]
    outputs = [await client.step(step) for step in steps]
    assert all(map(same, outputs, alone(world, steps)))


async def test_a_step_of_nothing_but_kept_pages_is_answered_without_computing(
    server: TinyServer, world: World, computed: list[int]
) -> None:
    prompt = PROMPT[:, : PAGES * PAGE_TOKENS]
    await after(server, prompt)
    [expected] = alone(world, [prompt])
    computed.clear()
    output = await (await server.session(**LONG)).step(prompt)
    assert computed == []
    assert same(output, expected)


async def test_decoded_tokens_are_kept_too(server: TinyServer, computed: list[int]) -> None:
    """As a chat's next turn begins with all that was said in the last one."""
    await after(server, PROMPT[:, :30], *PROMPT[:, 30:70].split(1, dim=1))
    computed.clear()
    await (await server.session(**LONG)).step(PROMPT)
    assert sum(computed) == PROMPT.shape[1] - 2 * PAGE_TOKENS


async def test_a_prompt_in_pieces_finds_the_same_pages(server: TinyServer, computed: list[int]) -> None:
    await after(server, PROMPT)
    computed.clear()
    client = await server.session(**LONG)
    for piece in PROMPT.split(40, dim=1):
        await client.step(piece)
    # 40 = a page and 8; at 80 two pages and 16 are held, at 101 three and 5.
    assert computed == [8, 16, 5]


async def test_outputs_of_pieces_are_those_of_a_session_alone(server: TinyServer, world: World) -> None:
    await after(server, PROMPT)
    client = await server.session(**LONG)
    pieces = list(PROMPT.split(40, dim=1))
    outputs = [await client.step(piece) for piece in pieces]
    assert all(map(same, outputs, alone(world, pieces)))


async def test_a_session_that_goes_another_way_shares_the_beginning_only(
    server: TinyServer, world: World, computed: list[int]
) -> None:
    await after(server, PROMPT)
    other = PROMPT.clone()
    other[:, PAGE_TOKENS + 3] += 1
    [expected] = alone(world, [other])
    computed.clear()
    output = await (await server.session(**LONG)).step(other)
    assert computed == [PROMPT.shape[1] - PAGE_TOKENS]
    assert same(output, expected)


async def test_tokens_that_were_taken_back_are_not_kept_in_a_page(
    server: TinyServer, world: World, computed: list[int]
) -> None:
    """As guesses are, that turned out wrong."""
    client = await server.session(**LONG)
    await client.step(PROMPT[:, :30])
    await client.step(hidden_states(1, 8, 99))
    await client.step(PROMPT[:, 31:40], position=31)
    client.close()
    await server.empty()
    steps = [PROMPT[:, :40]]
    [expected] = alone(world, steps)
    assert same(await (await server.session(**LONG)).step(steps[0]), expected)


async def test_right_guesses_behind_a_page_that_was_taken_back_are_kept(
    server: TinyServer, computed: list[int]
) -> None:
    client = await server.session(**LONG)
    await client.step(PROMPT[:, :30])
    await client.step(hidden_states(1, 8, 99))
    await client.step(PROMPT[:, 30:70], position=30)
    client.close()
    await server.empty()
    computed.clear()
    await (await server.session(**LONG)).step(PROMPT)
    assert sum(computed) == PROMPT.shape[1] - 2 * PAGE_TOKENS


async def test_a_session_that_went_far_back_keeps_no_wrong_page(server: TinyServer, world: World) -> None:
    client = await server.session(**LONG)
    await client.step(PROMPT)
    await client.step(hidden_states(1, 60, 5), position=7)
    client.close()
    await server.empty()
    other = torch.cat([PROMPT[:, :7], hidden_states(1, 60, 5)], dim=1)
    [expected] = alone(world, [other])
    assert same(await (await server.session(**LONG)).step(other), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.tensor([[0] * 3 + [1] * (PROMPT.shape[1] - 3)], dtype=torch.uint8)},
        {"positions": torch.arange(1, PROMPT.shape[1] + 1)[None]},
    ],
    ids=["padded", "other positions"],
)
async def test_padded_and_moved_texts_share_nothing(
    server: TinyServer, computed: list[int], options: dict[str, torch.Tensor]
) -> None:
    await after(server, PROMPT)
    await after(server, PROMPT, **options)
    computed.clear()
    await (await server.session(**LONG)).step(PROMPT, **options)
    assert computed == [PROMPT.shape[1]]


async def test_another_range_of_blocks_shares_nothing(server: TinyServer, computed: list[int]) -> None:
    await after(server, PROMPT)
    computed.clear()
    await (await server.session(start=START, stop=STOP - 1, **LONG)).step(PROMPT)
    assert computed == [PROMPT.shape[1]]


async def test_by_default_strangers_share_nothing(make: Make, computed: list[int]) -> None:
    server = await make(prefix_cache="client")
    await after(server, PROMPT)
    computed.clear()
    await (await server.session(**LONG)).step(PROMPT)
    assert computed == [PROMPT.shape[1]]


async def test_by_default_the_sessions_of_one_client_share(make: Make, computed: list[int]) -> None:
    server = await make(prefix_cache="client")
    transport = await server.join()
    await (await another_session_of(server, transport)).step(PROMPT)
    computed.clear()
    await (await another_session_of(server, transport)).step(PROMPT)
    assert computed == [5]


async def test_it_can_be_switched_off(make: Make, computed: list[int]) -> None:
    server = await make(prefix_cache="off")
    await after(server, PROMPT)
    computed.clear()
    await (await server.session(**LONG)).step(PROMPT)
    assert computed == [PROMPT.shape[1]]


async def test_sessions_that_need_the_room_get_it(make: Make, world: World) -> None:
    """Room for a session of four pages and for the full ones it leaves, but not for these and five pages."""
    page = PAGE_TOKENS * world.kv_bytes * (STOP - START)
    kept = page + PAGE_TOKENS * HIDDEN * 4
    server = await make(cache_bytes=4 * page + tail_bytes(HIDDEN, 4) + PAGES * kept)
    await after(server, PROMPT)
    pages = server.service.budget.pages
    await eventually(lambda: pages.nbytes >= PAGES * kept, "the pages are kept after the answer has left")
    other = hidden_states(1, 5 * PAGE_TOKENS, 3)
    [expected] = alone(world, [other])
    assert same(await (await server.session(**LONG)).step(other), expected)
    assert server.service.budget.pages.nbytes < PAGES * kept
    server.service.budget.audit()


async def test_a_step_that_fails_leaves_the_session_where_it_was(
    server: TinyServer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await after(server, PROMPT)
    client = await server.session(**LONG)
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "forward_many", lambda stage, parts: [RuntimeError("no")] * len(parts))
        reply = await client.try_step(PROMPT)
    assert isinstance(reply, Fault)
    assert same(await (await server.session(**LONG)).step(PROMPT), alone(world, [PROMPT])[0])


# pages that are asked for by name


def names(server: TinyServer, text: torch.Tensor, start: int = START, stop: int = STOP) -> tuple[bytes, ...]:
    return tuple(names_of(root_of("", start, stop), text[0]))


async def recalled(client: TinyClient, *wanted: bytes) -> int:
    reply = await client.ask(RestorePrefix(wanted))
    assert isinstance(reply, PrefixRestored), reply
    client.position = reply.tokens
    return reply.tokens


async def test_a_session_can_begin_with_pages_that_are_kept(
    server: TinyServer, world: World, computed: list[int]
) -> None:
    await after(server, PROMPT)
    expected = alone(world, [PROMPT])[0][:, PAGES * PAGE_TOKENS :]
    computed.clear()
    client = await server.session(**LONG)
    assert await recalled(client, *names(server, PROMPT)) == PAGES * PAGE_TOKENS
    assert same(await client.step(PROMPT[:, PAGES * PAGE_TOKENS :]), expected)
    assert computed == [5]


async def test_pages_that_are_not_kept_are_not_there(server: TinyServer) -> None:
    await after(server, PROMPT)
    client = await server.session(**LONG)
    assert await recalled(client, *names(server, PROMPT)[:1], bytes(32)) == PAGE_TOKENS


async def test_a_session_that_began_with_pages_keeps_new_ones(
    server: TinyServer, computed: list[int]
) -> None:
    """So does the turn after the next one find what was said in the next."""
    await after(server, PROMPT[:, :40])
    client = await server.session(**LONG)
    await recalled(client, *names(server, PROMPT)[:1])
    await client.step(PROMPT[:, PAGE_TOKENS:])
    client.close()
    await server.empty()
    computed.clear()
    await (await server.session(**LONG)).step(PROMPT)
    assert computed == [5]


async def test_recalled_pages_are_leased(server: TinyServer, world: World) -> None:
    await after(server, PROMPT)
    client = await server.session(**LONG)
    await recalled(client, *names(server, PROMPT))
    page = PAGE_TOKENS * world.kv_bytes * (STOP - START)
    assert server.used()[1] == PAGES * page + tail_bytes(HIDDEN, 4)


async def test_no_more_is_recalled_than_the_session_may_hold(server: TinyServer) -> None:
    await after(server, PROMPT)
    client = await server.session(max_length=2 * PAGE_TOKENS + 1)
    assert await recalled(client, *names(server, PROMPT)) == 2 * PAGE_TOKENS


async def test_where_pages_are_not_kept_none_are_recalled(make: Make) -> None:
    server = await make(prefix_cache="off")
    assert await recalled(await server.session(**LONG), bytes(32)) == 0


async def test_a_full_cache_recalls_nothing_and_serves_on(make: Make, world: World) -> None:
    page = PAGE_TOKENS * world.kv_bytes * (STOP - START)
    server = await make(cache_bytes=4 * page + tail_bytes(HIDDEN, 4))
    await after(server, PROMPT)
    other = await server.session(**LONG)
    await other.step(PROMPT[:, :40])
    client = await server.session(**LONG)
    assert await recalled(client, *names(server, PROMPT)) == 0
    assert server.used()[0] == 2
