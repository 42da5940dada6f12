"""The HTTP API of a swarm in this process, on a port of loopback, as clients meet it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from swarmkit import LocalSwarm
from swarmkit.api.app import create_app
from swarmkit.api.service import ApiService
from swarmkit.api.serving import serving
from tests.waiting import WITHIN, wait_until

STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
SUM = [{"role": "user", "content": "What is 3 + 4?"}]


@dataclass
class Api:
    """A server under test."""

    url: str
    swarm: LocalSwarm
    service: ApiService

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official client of OpenAI, which does not try again by itself."""
        options = {"api_key": "none", "max_retries": 0, "timeout": WITHIN, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def http(self, **options: Any) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=WITHIN, **options)


@contextmanager
def api_of(swarm: LocalSwarm, model: Any = None, **options: Any) -> Iterator[Api]:
    """Serve a model of the swarm from an event loop in a thread of its own."""
    app = create_app(model or swarm.model(), **{"name": "tiny-chat", **options})
    urls: list[str] = []
    ending: list[Callable[[], object]] = []

    async def serve() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with serving(app) as address:
            ending.append(lambda: loop.call_soon_threadsafe(ended.set))
            urls.append(address.url)
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="api")
    thread.start()
    try:
        wait_until(lambda: urls or not thread.is_alive(), "the API listens")
        yield Api(urls[0], swarm, app.state.service)
    finally:
        for end in ending:
            end()
        thread.join(WITHIN)
    assert not thread.is_alive()
