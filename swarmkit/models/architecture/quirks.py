"""One table of what architectures need beyond being cut into blocks.

Most need only their name in it, which says that the tests have found them equal to the local model. The
generic cut serves every base model that embeds, makes masks and rotary embeddings, runs its blocks one after
the other and normalises; what it does outside its blocks belongs to the head, and a stage leaves it out.
`FAMILIES` says what an architecture does otherwise, `REFUSED` why one cannot be cut. An architecture in
neither is tried by `swarmkit check`, and served if that agrees.

To add one: put it into `FAMILIES`, its tiny config into `tests/models/tiny.py` and a row into
`docs/models.md`, and run the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swarmkit.errors import ModelError


@dataclass(frozen=True)
class Family:
    """What one `model_type` needs beyond being cut.

    Attributes:
        stage_config: config values that a stage overrides, because the head has already done that work.
    """

    stage_config: Mapping[str, Any] = field(default_factory=dict)


# These base models multiply whatever embeddings they are given; the head has done so already.
_EMBEDDINGS_SCALED_ALREADY: Mapping[str, Any] = {"embedding_multiplier": 1.0}

FAMILIES: Mapping[str, Family] = {
    "apertus": Family(),
    "arcee": Family(),
    "bloom": Family(),
    "cohere": Family(),
    "cohere2": Family(),
    "deepseek_v3": Family(),
    "ernie4_5": Family(),
    "exaone4": Family(),
    "falcon": Family(),
    "flex_olmo": Family(),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family(),
    "gpt2": Family(),
    "gpt_neox": Family(),
    "gpt_oss": Family(),
    "granite": Family(stage_config=_EMBEDDINGS_SCALED_ALREADY),
    "granitemoe": Family(stage_config=_EMBEDDINGS_SCALED_ALREADY),
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "llama": Family(),
    "llama4_text": Family(),
    "minimax_m2": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "mpt": Family(),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "olmoe": Family(),
    "opt": Family(),
    "phi": Family(),
    "phi3": Family(),
    "phimoe": Family(),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "seed_oss": Family(),
    "smollm3": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
}

REFUSED: Mapping[str, str] = {
    "diffllama": "a block's attention depends on its index in the whole model",
    "falcon_h1": "each block has a state of state-space attention beside its keys and values",
    "gemma3n_text": "later blocks use the keys and values of earlier ones, and each block the token ids",
    "gemma4_text": "later blocks use the keys and values of earlier ones, and each block the token ids",
    "mamba": "all blocks are state-space ones, whose cache this version does not know",
    "minicpm3": "a block's output is scaled by the number of blocks in the whole model",
    "zamba2": "some blocks share their weights",
}

# Where a config says by block *index* which blocks are of which kind, these are rewritten for a cut that
# counts its blocks from 0. (Lists with one entry per block are sliced, and need no mention.)
LEADING_BLOCKS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Names of the number of dense blocks at the beginning."""
BLOCK_INDICES = ("moe_layers",)
"""Names of lists of the indices of blocks of one kind."""


def family_of(model_type: str) -> Family:
    """Return what `model_type` needs; for an unlisted one nothing, which a check has to confirm.

    Raises:
        ModelError: that architecture cannot be cut into blocks; the message says why.
    """
    reason = REFUSED.get(model_type)
    if reason is None and _wraps_a_language_model(model_type):
        reason = "it wraps a language model for images or sound too; give a checkpoint of the text part alone"
    if reason is not None:
        raise ModelError(
            f"{model_type!r} models cannot be cut into blocks by this version: {reason}. "
            f"Choose a model of one of these types: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES.get(model_type, Family())


def _wraps_a_language_model(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING and "text_config" in CONFIG_MAPPING[model_type].sub_configs
