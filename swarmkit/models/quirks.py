"""Which architectures can be cut into blocks, and what each needs beyond being cut: one table.

An architecture needs no entry of its own beyond its name when its base model does nothing but embed, make
masks and rotary embeddings, run its layers and normalise. What it does otherwise is said here.
To add one: put it into `FAMILIES`, add its tiny config to `tests/models/tiny.py`, and run the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swarmkit.errors import ModelError


@dataclass(frozen=True)
class Family:
    """What one `model_type` needs.

    Attributes:
        stage_config: config values that a stage overrides, because the head has already done that work.
        layer_kwargs: names under which the base model hands things to its layers, to the usual names.
        dequantises: how its published weights may be quantised, where transformers can undo that on loading.
    """

    stage_config: Mapping[str, Any] = field(default_factory=dict)
    layer_kwargs: Mapping[str, str] = field(default_factory=dict)
    dequantises: tuple[str, ...] = ()


# Granite's base model multiplies whatever embeddings it is given; the head has done so already.
_EMBEDDINGS_SCALED_ALREADY: Mapping[str, Any] = {"embedding_multiplier": 1.0}

FAMILIES: Mapping[str, Family] = {
    "apertus": Family(),
    "arcee": Family(),
    "cohere": Family(),
    "cohere2": Family(),
    "ernie4_5": Family(),
    "exaone4": Family(),
    "flex_olmo": Family(),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "glm": Family(),
    "glm4": Family(),
    "gpt_neox": Family(layer_kwargs={"layer_past": "past_key_values"}),
    "gpt_oss": Family(dequantises=("mxfp4",)),
    "granite": Family(stage_config=_EMBEDDINGS_SCALED_ALREADY),
    "granitemoe": Family(stage_config=_EMBEDDINGS_SCALED_ALREADY),
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "llama": Family(),
    "minimax_m2": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "olmoe": Family(),
    "phi": Family(),
    "phi3": Family(),
    "phimoe": Family(),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "seed_oss": Family(),
    "smollm3": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
}

REFUSED: Mapping[str, str] = {
    "bloom": "alibi biases and a layer norm after the embeddings",
    "deepseek_v3": "dense blocks before the sparse ones, and a rotary dimension of its own",
    "falcon": "alibi biases",
    "gemma3": "a language model that is wrapped in one for images (gemma3_text works)",
    "gpt2": "learned positions, which are added before the first block",
    "mpt": "alibi biases",
    "opt": "learned positions, which are added before the first block",
    "qwen3_next": "the state of linear attention in its cache",
}


def family_of(model_type: str) -> Family:
    """What `model_type` needs.

    Raises:
        ModelError: this version cannot cut that architecture into blocks; the message says why.
    """
    family = FAMILIES.get(model_type)
    if family is not None:
        return family
    known = ", ".join(sorted(FAMILIES))
    if model_type in REFUSED:
        raise ModelError(
            f"{model_type!r} models need a quirk that this version does not have: {REFUSED[model_type]}. "
            f"Choose a model of one of these types: {known}."
        )
    raise ModelError(
        f"{model_type!r} models have not been tried with this version. "
        f"Choose a model of one of these types, or add it to swarmkit/models/quirks.py: {known}."
    )
