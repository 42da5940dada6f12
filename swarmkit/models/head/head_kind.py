"""The kinds of heads: an architecture's causal language model, or its classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from swarmkit.errors import ModelError
from swarmkit.models.architecture.anatomy import Anatomy, anatomy_of, skeleton_of
from swarmkit.models.checkpoint.checkpoint import Checkpoint

_CONFIG = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id")


@dataclass(frozen=True)
class HeadKind:
    """One of the models that an architecture has.

    Attributes:
        config: entries that its config has besides the checkpoint's, such as `num_labels`.
    """

    name: Literal["causal", "classifier"]
    config: Mapping[str, Any] = field(default_factory=dict)

    def taken_from(self, options: Mapping[str, Any]) -> tuple[HeadKind, dict[str, Any]]:
        """Return this kind with those of `options` that belong into a classifier's config, and the other
        options.
        """
        own = {} if self.name == "causal" else {key: options[key] for key in _CONFIG if key in options}
        return HeadKind(self.name, own), {key: value for key, value in options.items() if key not in own}

    def class_of(self, config: PreTrainedConfig, anatomy: Anatomy) -> type[PreTrainedModel]:
        """Return the architecture's own class.

        Raises:
            ModelError: transformers has none.
        """
        if self.name == "causal":
            return anatomy.causal_class
        found: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        if not isinstance(found, type):
            raise ModelError(
                f"transformers has no model for sequence classification of the type {config.model_type!r}; "
                "choose another model, or put a layer of your own behind model.blocks"
            )
        return found

    def keys(
        self, checkpoint: Checkpoint, model_class: type[PreTrainedModel], config: PreTrainedConfig
    ) -> dict[str, str]:
        """Map the checkpoint's tensors that this model has outside its blocks to their names in it."""
        keys = checkpoint.head_keys()
        if self.name == "causal":
            return keys
        skeleton = skeleton_of(model_class, config)
        anatomy = anatomy_of(checkpoint.config)
        old, new = f"{anatomy.prefix}.", f"{base_path(skeleton, anatomy)}."
        renamed = {
            key: new + name.removeprefix(old) if name.startswith(old) else name for key, name in keys.items()
        }
        known = skeleton.state_dict()
        return {key: name for key, name in renamed.items() if name in known}

    def fresh(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Make new values for a classifier's own parameters that a checkpoint does not have."""
        if self.name == "causal":
            return {}
        spread = getattr(config, "initializer_range", 0.02)
        missing = {
            name: like
            for name, like in skeleton_of(model_class, config).state_dict().items()
            if name not in tensors and self.is_trainable(name)
        }
        return {
            name: torch.zeros(like.shape) if like.ndim < 2 else torch.randn(like.shape) * spread
            for name, like in missing.items()
        }

    def is_trainable(self, name: str) -> bool:
        """Whether a parameter of that name is the classifier's own."""
        return self.name == "classifier" and name.split(".")[0] in ("score", "classifier")


CAUSAL = HeadKind("causal")


def base_path(model: PreTrainedModel, anatomy: Anatomy) -> str:
    """Where a model has its base model."""
    return next(path for path, part in model.named_modules() if type(part) is anatomy.base_class)
