"""The head is the ordinary model, with one module in place of its layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, GenerationConfig, LlamaForCausalLM

from swarmkit.errors import ModelError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import build_head, load_local

from .tiny import ARCHITECTURES, make_checkpoint


class Recorder(nn.Module):
    """Blocks that change nothing and remember how they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden


class Greeter:
    """A mixin."""

    def greet(self) -> str:
        return f"I am a {type(self).__name__}"


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Path) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(checkpoints, "llama", num_blocks=4))


def test_a_head_is_of_the_architectures_class_and_of_the_mixin(checkpoint: Checkpoint) -> None:
    model = build_head(checkpoint, Recorder(), mixin=Greeter)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, Greeter)
    assert model.greet() == "I am a LlamaForCausalLM"
    assert type(build_head(checkpoint, Recorder())) is LlamaForCausalLM


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_head_looks_like_the_whole_model_and_gets_the_padding_mask(
    checkpoints: Path, model_type: str
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(checkpoints, model_type))
    blocks = Recorder()
    model = build_head(checkpoint, blocks)
    local = load_local(checkpoint)
    volatile = ("_name_or_path", "dtype", "use_cache")
    want, have = ({k: v for k, v in m.config.to_dict().items() if k not in volatile} for m in (local, model))
    assert have == want
    assert model.config.use_cache
    assert model.generation_config.use_cache
    assert model.config._attn_implementation.startswith("swarmkit")
    assert [module for module in model.modules() if isinstance(module, Recorder)] == [blocks]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    weights = dict(local.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name

    ids, mask = torch.tensor([[0, 5, 6], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert torch.equal(blocks.kwargs["attention_mask"], mask.bool())
    assert "past_key_values" in blocks.kwargs
    model(input_ids=ids, use_cache=False)
    no_mask = blocks.kwargs["attention_mask"]
    assert no_mask is None or bool(no_mask.all())


def test_a_cache_under_a_name_that_the_model_does_not_know_is_refused(checkpoint: Checkpoint) -> None:
    blocks = Recorder()
    build_head(checkpoint, blocks)
    with pytest.raises(UsageError, match="by no other name"):
        blocks(torch.zeros(1, 1, 32), past_key_values=DynamicCache(), cache=DynamicCache())


def test_tied_weights_stay_tied(checkpoints: Path) -> None:
    model = build_head(Checkpoint.open(make_checkpoint(checkpoints, "qwen3")), Recorder())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_untied_weights_are_loaded(checkpoint: Checkpoint) -> None:
    model = build_head(checkpoint, Recorder())
    stored = checkpoint.read(["lm_head.weight", "model.embed_tokens.weight"])
    assert torch.equal(model.get_output_embeddings().weight, stored["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("key", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_no_weight_is_made_up(tmp_path: Path, key: str) -> None:
    folder = make_checkpoint(tmp_path, "llama", num_blocks=2)
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=key):
        build_head(Checkpoint.open(folder), Recorder())


def test_the_checkpoints_generation_config_is_used(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", num_blocks=2)
    GenerationConfig(max_new_tokens=7, eos_token_id=[2, 9]).save_pretrained(folder)
    config = build_head(Checkpoint.open(folder), Recorder()).generation_config
    assert (config.max_new_tokens, config.eos_token_id) == (7, [2, 9])


def test_a_head_needs_only_the_files_of_the_head(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", num_blocks=6, shards=5)
    checkpoint = Checkpoint.open(folder)
    needed = {checkpoint.weight_map[key] for key in checkpoint.head_keys()}
    others = {file.name for file in folder.glob("*.safetensors")} - needed
    assert others
    for name in others:
        (folder / name).unlink()
    build_head(Checkpoint.open(folder), Recorder())


def test_the_door_is_light() -> None:
    code = "import sys, swarmkit.models; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=30)


@pytest.mark.parametrize("make", [load_local, lambda checkpoint: build_head(checkpoint, Recorder())])
def test_the_packaged_model_says_where_it_can_be_loaded_from(make: Any) -> None:
    model = make(Checkpoint.open("tiny-chat"))
    assert AutoConfig.from_pretrained(model.name_or_path).model_type == "llama"
