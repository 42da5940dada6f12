"""Twenty machines, each with a limit on memory that the kernel enforces: none runs out on the first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ..models.tiny import make_checkpoint

MIB = 2**20
ROOT = Path(__file__).parents[2]

WIDTHS = {"small blocks": (256, 1024, 64), "large blocks": (512, 2048, 24)}
"""Hidden size, size of the feed-forward, and number of blocks."""

PROFILES = [
    (width, memory, dtype, tokens, step)
    for width, memory, dtype, tokens, step in [
        ("small blocks", 640, "float32", 2048, 64),
        ("small blocks", 672, "float32", 4096, 128),
        ("small blocks", 704, "bfloat16", 4096, 64),
        ("small blocks", 736, "bfloat16", 16384, 64),
        ("small blocks", 768, "float32", 8192, 256),
        ("small blocks", 800, "float32", 1024, 512),
        ("small blocks", 832, "bfloat16", 32768, 128),
        ("small blocks", 864, "int8", 16384, 64),
        ("small blocks", 896, "float32", 16384, 64),
        ("small blocks", 960, "int8", 2048, 256),
        ("large blocks", 672, "float32", 1024, 64),
        ("large blocks", 704, "bfloat16", 2048, 64),
        ("large blocks", 736, "float32", 4096, 64),
        ("large blocks", 768, "int8", 4096, 128),
        ("large blocks", 800, "float32", 2048, 256),
        ("large blocks", 832, "bfloat16", 8192, 128),
        ("large blocks", 864, "float32", 8192, 64),
        ("large blocks", 896, "int8", 16384, 64),
        ("large blocks", 928, "float32", 1024, 512),
        ("large blocks", 960, "bfloat16", 16384, 256),
    ]
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's own memory"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    def made(width: str) -> Path:
        hidden, inner, blocks = WIDTHS[width]
        return make_checkpoint(
            tmp_path_factory.mktemp("model"),
            "llama",
            num_blocks=blocks,
            shards=blocks,  # of which one at a time is mapped, which counts as memory of its own
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=hidden // 8,
        )

    return {width: made(width) for width in WIDTHS}


@cache
def served(path: Path, memory_mib: int, dtype: str, tokens: int, step: int, compiles: str) -> dict[str, Any]:
    """What the server within these limits says of itself at the end."""
    command = [sys.executable, "-m", "tests.server.memory_program", str(path), str(memory_mib * MIB)]
    run = subprocess.run(
        [*command, dtype, str(tokens), str(step), compiles],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=dict(os.environ, OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="2"),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("compiles", ["auto", "off"])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda one: "-".join(map(str, one)).replace(" ", "-"))
def test_a_server_serves_its_first_tokens_within_its_memory(
    checkpoints: dict[str, Path], profile: tuple[str, int, str, int, int], compiles: str
) -> None:
    width, *limits = profile
    found = served(checkpoints[width], *limits, compiles)
    assert found["private_bytes"] <= profile[1] * MIB
    assert 0.8 <= found["used"] <= 1.0
    assert found["cache_share"] >= 1.0
