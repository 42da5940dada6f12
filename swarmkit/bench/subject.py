"""The models that are measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.random_llama import make_random_llama
from swarmkit.models.checkpoint.checkpoint import Checkpoint

SIZES: dict[str, dict[str, Any]] = {
    "M": {},  # what `make_random_llama` makes
    "S": {
        "hidden_size": 256,
        "num_blocks": 8,
        "num_heads": 4,
        "num_kv_heads": 4,
        "intermediate_size": 688,
    },
    "L": {
        "hidden_size": 4096,
        "num_blocks": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
        "dtype": torch.bfloat16,
    },
}
"""Random Llamas: S and M of the sizes that the engine's targets are written for, L as large as Llama 3 8B."""


@dataclass(frozen=True)
class Subject:
    """A model to measure, and how results call it."""

    checkpoint: Checkpoint
    label: str

    @property
    def vocab_size(self) -> int:
        return int(self.checkpoint.config.vocab_size)


@contextmanager
def open_subject(model: str, on_progress: Progress = quiet, device: str = "cpu") -> Iterator[Subject]:
    """The model `S`, `M`, `L`, `tiny-chat`, of a folder or a repo id; random ones exist for the block's time.

    Args: device: where random weights are drawn.
    """
    if model not in SIZES:
        checkpoint = Checkpoint.open(model)
        yield Subject(checkpoint, checkpoint.name if model == "tiny-chat" else _described(checkpoint))
        return
    with tempfile.TemporaryDirectory(prefix="swarmkit-bench-") as folder:
        on_progress(f"writing the random Llama {model}", 0, 1)
        checkpoint = Checkpoint.open(make_random_llama(Path(folder), **SIZES[model], device=device))
        yield Subject(checkpoint, f"{model} ({_described(checkpoint)})")


def _described(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    kind = "random Llama" if config.model_type == "llama" else config.model_type
    return f"{kind}, hidden {checkpoint.hidden_size}, {checkpoint.num_blocks} blocks"
