"""One thread, and a cache folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("user-cache")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **kwargs: str(cache))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for checkpoints that several tests may share, as none of them changes one."""
    return tmp_path_factory.mktemp("checkpoints")
