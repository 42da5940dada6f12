"""The language model inside a model for images or sound: its config, and its tensors among the others.

Such a config has a `text_config`, and transformers has a model for that alone (Gemma 3, Llama 4, Mistral 3,
LLaVA, InternVL and more). Of the checkpoint, exactly the text model's tensors are used::

    language_model.model.layers.0.…    or    model.language_model.layers.0.…     ->  model.layers.0.…
    language_model.lm_head.weight      or    lm_head.weight                      ->  lm_head.weight
    vision_tower.…, multi_modal_projector.…, …                                   ->  left where they are
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from swarmkit.errors import ModelError

_PART = "language_model"
_OUTPUT = "lm_head."


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the language model inside `config`, which is itself unless it wraps one.

    Raises:
        ModelError: it wraps one that cannot be used alone.
    """
    if "text_config" not in config.sub_configs:
        return config
    text: PreTrainedConfig = config.text_config
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None) is None:
        raise ModelError(
            f"{config.model_type!r} models are for images or sound too, and transformers has no model for "
            f"their text part ({text.model_type!r}) alone. Choose a model of text only, or one of those that "
            "docs/models.md names."
        )
    # The output layer belongs to the wrapping model.
    text.tie_word_embeddings = config.tie_word_embeddings
    if getattr(text, "dtype", None) is None:
        text.dtype = getattr(config, "dtype", None)
    if (stored := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = stored
    return text


def text_names(keys: Iterable[str]) -> dict[str, str]:
    """Map those of a wrapper's tensors that may be the language model's to their names in that model."""
    keys = list(keys)
    if not any(_PART in key.split(".") for key in keys):
        return {key: key for key in keys}
    return {key: plain_name(key) for key in keys if _PART in key.split(".") or key.startswith(_OUTPUT)}


def plain_name(name: str) -> str:
    """Return the name in a language model alone of a part of a wrapped one."""
    return ".".join(part for part in name.split(".") if part != _PART) or name
