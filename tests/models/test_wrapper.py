"""Language models inside models for images: cut out, they say what the whole says about text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from swarmkit.errors import ModelError
from swarmkit.models.check import config_of
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import build_head, load_local

from .test_equality import assert_same, prompts
from .tiny import StageChain, tiny_config

CUTS = [(0, 1), (1, 3)]
_EYES = {
    "gemma3": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "llava": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "mistral3": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8},
    "llama4": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    },
}
_TEXT = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral", "llama4": "llama4_text"}


def make_wrapper(folder: Path, model_type: str) -> Any:
    """A tiny random model for images and text, saved by transformers; returns it."""
    text = tiny_config(_TEXT[model_type], 3, **({"layer_types": None} if model_type == "gemma3" else {}))
    config_class = CONFIG_MAPPING[model_type]
    vision_type = {"vision_config": {**_EYES[model_type], "image_size": 28, "patch_size": 14}}
    if model_type in ("llava", "mistral3"):
        vision_type["vision_config"]["model_type"] = (
            "clip_vision_model" if model_type == "llava" else "pixtral"
        )
    config = config_class(text_config=text.to_dict(), **vision_type)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.tie_weights()
    model.save_pretrained(folder)
    return model.eval()


def as_published(folder: Path) -> None:
    """transformers saves by the names that such checkpoints have had from the beginning."""
    names = [key for file in folder.glob("*.safetensors") for key in load_file(file)]
    assert any(name.startswith("language_model.model.layers.0.") for name in names)


def by_newer_names(folder: Path) -> None:
    """As transformers 5 calls the modules."""

    def renamed(key: str) -> str:
        if "lm_head." in key:
            return key.removeprefix("language_model.")
        if key.startswith("language_model.model."):
            return key.replace("language_model.model.", "model.language_model.", 1)
        return key if key.startswith("model.") else f"model.{key}"

    for file in folder.glob("*.safetensors"):
        tensors: dict[str, Tensor] = {renamed(key): value for key, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("rename", [as_published, by_newer_names])
@pytest.mark.parametrize("model_type", sorted(_TEXT))
def test_the_language_model_inside_is_cut_like_any_other(
    tmp_path: Path, model_type: str, rename: Any
) -> None:
    whole = make_wrapper(tmp_path, model_type)
    rename(tmp_path)
    opened = Checkpoint.open(tmp_path)
    stages = [Stage.load(opened, start, stop) for start, stop in CUTS]
    model = build_head(opened, StageChain(stages))
    ids, _ = prompts(2)
    with torch.no_grad():
        # Without images, the whole Llama 4 of transformers 5.24 fails when its language model has answered.
        asked = whole.language_model if model_type == "llama4" else whole
        wanted = asked(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert_same(build_head(opened, StageChain(stages)), load_local(opened), *prompts(2, padded=True))


def test_only_the_text_models_tensors_are_used(tmp_path: Path) -> None:
    make_wrapper(tmp_path, "gemma3")
    opened = Checkpoint.open(tmp_path)
    used = {*opened.head_keys(), *opened.block_keys(0, 3)}
    assert {key for key in opened.weight_map if "vision" in key or "projector" in key}.isdisjoint(used)
    assert opened.model_type == "gemma3_text"
    assert len(opened.head_keys()) == 2  # embeddings and norm: the output layer is the embeddings


def test_a_text_part_that_cannot_stand_alone_is_refused(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["qwen2_5_vl"]()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ModelError, match=r"'qwen2_5_vl' models are for images.*qwen2_5_vl_text.*alone"):
        Checkpoint.open(tmp_path)


def test_tensors_by_other_names_are_said_to_be(tmp_path: Path) -> None:
    make_wrapper(tmp_path, "gemma3")
    for file in tmp_path.glob("*.safetensors"):
        tensors = {key.replace("layers", "strata"): value for key, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for block 0.*named"):
        Checkpoint.open(tmp_path).block_keys(0, 1)


def test_the_check_is_of_the_text_part() -> None:
    assert config_of("gemma3").model_type == "gemma3_text"
