"""The Python examples of README and docs run as they stand there, over a swarm with an adapter to choose."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import swarmkit
from swarmkit import LocalSwarm, SwarmModelForCausalLM

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    pytest.param(block, id=f"{document.name}:{number}")
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL))
]
PLACES = {
    '"/ip4/…/p2p/…"': "address",
    'from_pretrained("…", initial_peers=[…]': 'from_pretrained("tiny-chat", initial_peers=[address]',
    "server.wait()": "server.blocks",  # which would wait for ever
}
"""What a reader fills in, and what it is here."""


@dataclass
class World:
    swarm: LocalSwarm
    folder: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("examples")
    with LocalSwarm("tiny-chat", num_stages=1) as swarm:
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
        for name in ("name", "my-adapter"):
            swarmkit.get_peft_model(swarm.model(), config).save_pretrained(folder / name)
        swarm.add_server(adapters=[folder / "name"])
        yield World(swarm, folder)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(world: World, example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for written, meant in PLACES.items():
        example = example.replace(written, meant)
    example = re.sub(r"^….*$", "", example, flags=re.MULTILINE)  # what the text said before
    monkeypatch.chdir(world.folder)
    tokenizer = world.swarm.tokenizer()
    text = dict(tokenizer("Tell me a story about a fox.", return_tensors="pt"))
    text = {name: value for name, value in text.items() if name in ("input_ids", "attention_mask")}
    batch = {**text, "labels": text["input_ids"]}
    names: dict[str, Any] = {
        "swarmkit": swarmkit,
        "SwarmModelForCausalLM": SwarmModelForCausalLM,
        "LoraConfig": peft.LoraConfig,
        "torch": torch,
        "copy": copy,
        "address": world.swarm.initial_peers[0],
        "model": world.swarm.model(),
        "tokenizer": tokenizer,
        "inputs": text,
        "prompt": text,
        "questions": [text],
        "batch": batch,
        "batches": [batch],
        "ids": text["input_ids"],
        "mask": text["attention_mask"],
        "labels": text["input_ids"],
    }
    exec(compile(example, "example", "exec"), names)
