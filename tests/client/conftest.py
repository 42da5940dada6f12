"""One torch thread: tiny models gain nothing from more, and tests share the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarmkit.models.checkpoint.checkpoint import Checkpoint

from ..models.tiny import make_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random Llama of five blocks that can hold 4096 tokens."""
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    return Checkpoint.open(make_checkpoint(folder, "llama", max_position_embeddings=4096))
