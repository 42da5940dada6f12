"""One model of four blocks on two servers, for all tests of a file that leave the servers as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swarmkit import LocalSwarm
from swarmkit.models.checkpoint.checkpoint import Checkpoint

from ...models.tiny import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("tuned"), "llama", num_blocks=4))


@pytest.fixture(scope="module")
def swarm(checkpoint: Checkpoint) -> Iterator[LocalSwarm]:
    with LocalSwarm(checkpoint, num_stages=2, transport="memory") as swarm:
        yield swarm
