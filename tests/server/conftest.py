from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import torch

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage

from ..models.tiny import make_checkpoint
from .worlds import START, STOP, TinyServer, World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("served"), "llama", num_blocks=5))
    return World(checkpoint, Stage.load(checkpoint, START, STOP, dtype=torch.float32))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
async def server(world: World) -> AsyncIterator[TinyServer]:
    server = await TinyServer(world).start()
    yield server
    await server.close()
