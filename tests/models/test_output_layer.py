"""A model's output layer, read alone, gives the logits of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from swarmkit.errors import ModelError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local
from swarmkit.models.head.output_layer import OutputLayer, output_layer_bytes, top_logits

from .tiny import VOCABULARY, make_checkpoint


def states(rows: int, width: int = 32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("is_tied", [False, True], ids=["own weights", "tied to the embeddings"])
@pytest.mark.parametrize("model_type", ["llama", "gptj"])  # gptj's has a bias
def test_its_logits_are_those_of_the_model(tmp_path: Path, model_type: str, is_tied: bool) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, model_type, tie_word_embeddings=is_tied))
    layer = load_local(checkpoint).get_output_embeddings()
    hidden = states(3)
    torch.testing.assert_close(OutputLayer.load(checkpoint)(hidden), layer(hidden), rtol=1e-6, atol=1e-6)


def test_its_memory_is_what_its_weights_take(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "llama"))
    assert output_layer_bytes(checkpoint) == VOCABULARY * checkpoint.hidden_size * 4


def test_an_output_layer_that_is_not_in_the_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "llama", tie_word_embeddings=False))
    names = checkpoint.head_keys()
    checkpoint.__dict__["_names"] = {key: name for key, name in names.items() if name == "model.norm.weight"}
    with pytest.raises(ModelError, match="no weights for its output layer"):
        OutputLayer.load(checkpoint)


def test_the_largest_logits_come_first_with_the_sum_over_all() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    found = top_logits(logits, 2, temperature=0.5)
    assert found.values.tolist() == [[4.0, 3.0]]
    assert found.tokens is not None
    assert found.tokens.tolist() == [[1, 3]]
    torch.testing.assert_close(found.log_sum_exp, torch.logsumexp(logits / 0.5, dim=1))
