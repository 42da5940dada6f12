"""Some blocks of a loaded model, called as if the model had only those."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from swarmkit.models.architecture.anatomy import Anatomy, replace
from swarmkit.models.architecture.quirks import FAMILIES
from swarmkit.models.kv.cache import StageCache

_NO_MASK = "swarmkit-no-mask"
"""An attention implementation for which transformers knows no mask function, so that it makes no mask.
Only the base model's copy of the config carries it; the attention modules keep their own."""


def with_blocks(
    base: PreTrainedModel, layers: str, config: PreTrainedConfig, blocks: Sequence[nn.Module]
) -> PreTrainedModel:
    """Copy a model, sharing everything but its config and its blocks."""
    model = _shallow(base, layers, config)
    replace(model, layers, _Blocks(blocks))
    return model


def _shallow(base: PreTrainedModel, layers: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Copy a model, sharing everything but its config and the modules on the path to its blocks."""
    model = _shallow_module(base, config)
    parent: nn.Module = model
    for name in layers.split(".")[:-1]:
        child = _shallow_module(parent.get_submodule(name), config)
        setattr(parent, name, child)
        parent = child
    return model


def _shallow_module(module: Any, config: PreTrainedConfig) -> Any:
    same = copy.copy(module)
    same._modules = dict(module._modules)
    same.config = config
    return same


class _Blocks(nn.ModuleList):
    """A list of blocks. Base models loop over `self.layers[:n]`, which else would make a new list at every
    step.
    """

    def __getitem__(self, index: Any) -> Any:
        return self if index == slice(None, len(self)) else super().__getitem__(index)


class View:
    """The base model with only some of its blocks, sharing all weights with it, and called quickly.

    It calls the architecture's own forward function without transformers' decorators around it: these collect
    intermediate results, which are not needed here, and cost as much as a rotary embedding at each step.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self._forward = inspect.unwrap(type(model).forward)
        self._cache_argument = anatomy.cache_argument
        self.model = model
        self.config: Any = model.config
        # Only where it is known which windows there are can a mask be left out.
        known = self.config.model_type in FAMILIES and anatomy.uses_attention_interface
        windows = [getattr(self.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self._maskless_until: float = (
            min([w for w in windows if w is not None], default=math.inf) if known else 0
        )
        config = copy.copy(self.config)
        config._attn_implementation = _NO_MASK
        self._maskless = _shallow(model, anatomy.layers, config)

    def needs_no_mask(self, hidden: Tensor, past: int) -> bool:
        """Whether these tokens, if none is padding, attend to all others: it is one, within every window."""
        return hidden.shape[1] == 1 and past < self._maskless_until

    def __call__(
        self,
        hidden: Tensor,
        cache: StageCache | None,
        past: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        model = self.model
        if attention_mask is None:
            if self.needs_no_mask(hidden, past):
                model = self._maskless
        else:
            attention_mask = attention_mask.to(hidden.device)
        if position_ids is not None:
            position_ids = position_ids.to(hidden.device)
        out = self._forward(
            model,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            **{self._cache_argument: cache},
        )
        result: Tensor = out.last_hidden_state
        return result.contiguous()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the same tensor on `device`.

    A plain copy to an accelerator waits until the accelerator has done all its work. A copy from pinned
    memory is queued behind that work.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
