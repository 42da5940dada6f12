"""Loading from the Hub: only what is needed is fetched, and every failure says what to do.

The Hub's client reads HF_ENDPOINT when it is imported, so these tests run it in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarmkit.models.checkpoint import Checkpoint

from .hub import LocalHub, local_hub
from .tiny import make_checkpoint

ROOT = Path(__file__).parents[2]

STEPS = """
import json, sys
import torch
torch.set_num_threads(1)
from swarmkit.errors import ModelError
from swarmkit.models.checkpoint import Checkpoint
from swarmkit.models.stage import Stage
from swarmkit.models.head import build_head
out = []
for step, argument in json.loads(sys.argv[1]):
    try:
        if step == "open":
            checkpoint = Checkpoint.open(argument)
        elif step == "fingerprint":
            out.append(checkpoint.fingerprint)
        elif step == "stage":
            Stage.load(checkpoint, *argument)
        elif step == "head":
            build_head(checkpoint, torch.nn.Identity())
    except ModelError as error:
        out.append(f"ModelError: {error}")
print(json.dumps(out))
"""


def in_a_process(hub_url: str, home: Path, steps: list[tuple[str, Any]], **environment: str) -> list[str]:
    """Fingerprints and errors of `steps`, in order."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    clean |= {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", STEPS, json.dumps(steps)],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def folder(checkpoints: Path) -> Path:
    return make_checkpoint(checkpoints, "llama", num_blocks=6, shards=4, seed=3)


def files_of_blocks(folder: Path, start: int, stop: int) -> set[str]:
    checkpoint = Checkpoint.open(folder)
    return {checkpoint.weight_map[key] for key in checkpoint.block_keys(start, stop)}


def weights(hub: LocalHub) -> set[str]:
    return {name for name in hub.fetched if name.endswith(".safetensors")}


def test_a_server_fetches_only_its_shards_and_agrees_with_everybody(folder: Path, tmp_path: Path) -> None:
    mine = Checkpoint.open(folder).fingerprint
    with local_hub({"some/llama": folder}) as hub:
        steps = [("open", "some/llama"), ("fingerprint", None), ("stage", [2, 3])]
        assert in_a_process(hub.url, tmp_path, steps) == [mine]
        assert weights(hub) == files_of_blocks(folder, 2, 3)
        assert len(weights(hub)) < 4

        steps = [*steps, ("stage", [0, 6]), ("open", "some/other")]
        told, *errors = in_a_process(hub.url, tmp_path, steps, HF_HUB_OFFLINE="1")
        assert told == mine
        assert len(errors) == 2
        assert all("HF_HUB_OFFLINE is set" in error for error in errors)


def test_a_single_file_serves_head_and_stage_and_failures_say_what_to_do(
    checkpoints: Path, folder: Path, tmp_path: Path
) -> None:
    single = make_checkpoint(checkpoints, "qwen3", num_blocks=2)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((folder / "config.json").read_bytes())
    (old / "pytorch_model.bin").write_bytes(b"")
    empty = tmp_path / "empty"
    empty.mkdir()
    repos = {"some/qwen": single, "some/gated": None, "some/old": old, "some/empty": empty}
    with local_hub(repos) as hub:
        steps = [("open", "some/qwen"), ("fingerprint", None), ("head", None), ("stage", [0, 2])]
        wrong = [("open", name) for name in ("some/typo", "some/gated", "some/old", "some/empty")]
        told, *errors = in_a_process(hub.url, tmp_path, [*steps, *wrong])
        assert told == Checkpoint.open(single).fingerprint
        assert hub.fetched.count("model.safetensors") == 1
        advice = ["Check the spelling", "HF_TOKEN", "Convert them once", "no config.json"]
        assert [part in error for part, error in zip(advice, errors, strict=True)] == [True] * 4, errors
