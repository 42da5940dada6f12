"""A draft for any model: its own first blocks, with its embeddings and its output layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from swarmkit.errors import UsageError
from swarmkit.models.architecture.anatomy import anatomy_of, replace
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head import load_local


def load_first_blocks(
    checkpoint: Checkpoint, blocks: int, *, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The ordinary model on this machine, without all but its first blocks.

    Raises:
        UsageError: it has fewer.
    """
    if not 1 <= blocks <= checkpoint.num_blocks:
        raise UsageError(f"a draft of 1 to {checkpoint.num_blocks} blocks can be had, not of {blocks}")
    anatomy = anatomy_of(checkpoint.config)
    model = load_local(checkpoint, dtype=dtype)
    base: Any = model.get_submodule(anatomy.prefix)
    layers: Any = base.get_submodule(anatomy.layers)
    replace(base, anatomy.layers, nn.ModuleList(list(layers)[:blocks]))
    for config in (model.config, base.config):
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
    return model
