"""A server process that is killed under many streams: each client gets its whole answer, and no error."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from swarmkit import LocalSwarm
from swarmkit.events import PeerReplaced
from tests.api.worlds import Api, api_of
from tests.waiting import WITHIN

ANIMALS = ("fox", "hen", "cow", "dog", "cat", "owl", "pig", "goat", "duck", "horse")
_TOKENS_BEFORE = 3


@pytest.fixture(scope="module")
def api(kept_fork_server: None) -> Iterator[Api]:
    with LocalSwarm("tiny-chat", num_stages=2, replicas=2, processes=True) as swarm, api_of(swarm) as api:
        yield api


def request(number: int) -> dict[str, Any]:
    """One of many requests: a story that goes on for long, greedy or with a seed."""
    sampling: dict[str, Any] = {"temperature": 0.8, "seed": number} if number % 2 else {}
    animal = ANIMALS[number % len(ANIMALS)]
    return {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": f"Tell me a story about a {animal}."}],
        "logit_bias": {"1": -100},  # the token that would end it
        "max_tokens": 60,
        **sampling,
    }


async def streamed(client: openai.AsyncOpenAI, number: int, begun: asyncio.Semaphore) -> str:
    """The text of a stream, which tells when it has begun."""
    text, told = "", 0
    async for chunk in await client.chat.completions.create(**request(number), stream=True):
        text += chunk.choices[0].delta.content or ""
        told += 1
        if told == _TOKENS_BEFORE:
            begun.release()
    return text


async def stories(api: Api, many: int, kill: Any = None) -> list[str]:
    """So many streams at a time, with a server that is killed once all of them have begun."""
    begun = asyncio.Semaphore(0)
    client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0, timeout=4 * WITHIN)
    async with client:
        streams = [asyncio.create_task(streamed(client, number, begun)) for number in range(many)]
        for _ in range(many):
            await begun.acquire()
        if kill is not None:
            assert not any(stream.done() for stream in streams), "all of them are under way"
            await asyncio.to_thread(kill)
        return list(await asyncio.gather(*streams))


def check_kill(api: Api, many: int) -> None:
    model = api.service.engine.model
    killed: list[Any] = []

    def kill() -> None:
        """Kill a server that one of the streams uses just now."""
        used = model.trace[-1].hops[0].label
        killed.extend(server for server in api.swarm.servers if server.public_name == used)
        killed[0].kill()

    wanted = asyncio.run(stories(api, many))
    found = asyncio.run(stories(api, many, kill))
    assert found == wanted
    [victim] = killed
    replaced = {event.label for event in model.events if isinstance(event, PeerReplaced)}
    assert victim.public_name in replaced
    api.swarm.add_server(victim.blocks)  # for the next test


@pytest.mark.timeout(300)
def test_eight_streams_survive_a_killed_server(api: Api) -> None:
    check_kill(api, 8)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_streams_survive_a_killed_server(api: Api) -> None:
    check_kill(api, 50)
