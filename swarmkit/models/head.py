"""The part of a model that stays with its user: embeddings, final norm, output layer, and `generate`.

It is the ordinary causal language model of the architecture, except that its list of decoder layers holds
one module which stands for all of them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from swarmkit.errors import ModelError
from swarmkit.models.anatomy import anatomy_of, resolve_dtype
from swarmkit.models.checkpoint import Checkpoint
from swarmkit.models.loading import load_model, loader
from swarmkit.models.quirks import family_of

ATTENTION = "swarmkit"
"""The attention implementation of a head: it has no attention, and hands padding masks on as they are."""


def _no_attention(*args: Any, **kwargs: Any) -> Any:
    raise ModelError("A head has no attention of its own; its blocks do that. Was a layer added to it?")


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Instead of a `[batch, 1, tokens, past + tokens]` mask, the padding mask that it would be made from."""
    return attention_mask


AttentionInterface.register(ATTENTION, _no_attention)
AttentionMaskInterface.register(ATTENTION, _padding_mask)


def build_head(
    checkpoint: Checkpoint,
    blocks: nn.Module,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    mixin: type | None = None,
) -> PreTrainedModel:
    """The architecture's own causal language model with `blocks` in place of all its decoder layers.

    Reads only the tensors that are in no block. Parameters are frozen, the model is in evaluation mode, and
    its generation config is the checkpoint's where it has one.

    Args:
        blocks: called as `blocks(hidden, **kwargs)` with `hidden` of `[batch, tokens, hidden]` and what
            transformers hands to a decoder layer, among it `past_key_values` (None without a cache),
            `position_ids` (`[batch or 1, tokens]`) and `attention_mask`: bool `[batch, past + tokens]`,
            false at padding, or None. Returns a tensor of the shape of `hidden`.
        dtype: "auto" is float32 on a CPU and the checkpoint's own dtype on an accelerator.
        mixin: a class put before the architecture's in a subclass made for the purpose, so that the model is
            an instance of both. Its `__init__` is not called.

    Raises:
        ModelError: weights are missing, unknown or of a wrong shape, or the architecture is not supported.
    """
    anatomy = anatomy_of(checkpoint.config)
    model_class = anatomy.causal_class
    # Lists with an entry per layer stay whole: models look at them to see which masks they will ever need.
    config = copy.deepcopy(checkpoint.config)
    config.num_hidden_layers = 0
    if hasattr(config, "quantization_config"):
        # Only weights inside blocks are stored quantised.
        del config.quantization_config
    keys = checkpoint.head_keys()
    model = load_model(
        model_class,
        config,
        {keys[key]: tensor for key, tensor in checkpoint.read(keys).items()},
        dtype=resolve_dtype(dtype, checkpoint.config, device),
        device=device,
        attn_implementation=ATTENTION,
        name=checkpoint.name,
    )
    renames = family_of(checkpoint.model_type).layer_kwargs
    if renames:

        def usual_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {renames.get(key, key): value for key, value in kwargs.items()}

        blocks.register_forward_pre_hook(usual_names, with_kwargs=True)
    base = model.get_submodule(anatomy.prefix)
    setattr(base, anatomy.layers, nn.ModuleList([blocks]))
    part: Any
    for part in (model, base):
        part.config.num_hidden_layers = checkpoint.num_blocks
    model.config._name_or_path = model.name_or_path = checkpoint.name
    _set_generation_config(model, checkpoint)
    if mixin is not None:
        # Only now: the mixin may have a `from_pretrained` of its own, which is not the one that loads.
        namespace = {"__module__": mixin.__module__}
        model.__class__ = type(f"Swarm{model_class.__name__}", (mixin, model_class), namespace)
    return model


def load_local(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The whole ordinary model on this machine, as transformers loads it; what a swarm must agree with.

    Raises:
        ModelError: transformers cannot load it.
    """
    where, options = checkpoint.files.pretrained()
    wanted = resolve_dtype(dtype, checkpoint.config, device)
    options |= {"config": copy.deepcopy(checkpoint.config), "dtype": wanted, "trust_remote_code": False}
    try:
        with loader():
            model: Any = AutoModelForCausalLM.from_pretrained(where, **options)
    except Exception as error:
        raise ModelError(f"transformers cannot load {checkpoint.name}: {error}") from error
    model.to(device)
    model.eval()
    model.requires_grad_(False)
    whole: PreTrainedModel = model
    return whole


def _set_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    path = checkpoint.files.find("generation_config.json")
    if path is None:
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(str(path.parent))
    except Exception as error:
        raise ModelError(f"generation_config.json of {checkpoint.name} cannot be used: {error}") from error
