"""What was needed for a while goes back to the system."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from swarmkit.server.engine.trim_malloc import trim_malloc

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked to")
def test_freed_memory_is_given_back() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pieces = [torch.ones(16_000) for _ in range(4000)]  # too small for pages of their own
    last = pieces[-1]  # behind all others, so that the heap does not end before them
    assert process.memory_info().rss - before > 200 * MIB
    del pieces
    trim_malloc()
    assert process.memory_info().rss - before < 50 * MIB
    assert last.sum() == 16_000
