"""One swarm and one server for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from swarmkit import LocalSwarm
from tests.api.worlds import Api, api_of


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with LocalSwarm("tiny-chat", num_stages=2, transport="memory") as swarm, api_of(swarm) as api:
        yield api


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    with api.openai() as client:
        yield client
