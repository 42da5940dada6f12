"""The part of a model that stays with the client: embeddings, final norm, output layer, and `generate`.

It is the ordinary causal language model of the architecture, except that its list of decoder layers holds one
module that stands for all of them.
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

from swarmkit.errors import ModelError, UsageError
from swarmkit.models.architecture.anatomy import (
    CACHE_ARGUMENTS,
    Anatomy,
    anatomy_of,
    replace,
    resolve_dtype,
    skeleton_of,
)
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.foreign_errors import reason_of
from swarmkit.models.head.head_kind import CAUSAL, HeadKind, base_path
from swarmkit.models.loading import load_model, loader
from swarmkit.models.quantization.precision import Precision
from swarmkit.models.quantization.stored import StoredQuantisation

ATTENTION = "swarmkit"
"""Name of a head's attention implementation, which has no attention, and passes padding masks on unchanged.
"""
_ATTENTION_WITH_MASK = "swarmkit-with-mask"


def _no_attention(*args: Any, **kwargs: Any) -> Any:
    raise ModelError("A head has no attention of its own; its blocks do that. Was a layer added to it?")


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Return the padding mask, instead of a `[batch, 1, tokens, past + tokens]` mask made from it."""
    return attention_mask


def _always_a_mask(
    batch_size: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return the padding mask, or one of ones: some base models work on the mask, and need one."""
    if attention_mask is None:
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    return attention_mask


AttentionInterface.register(ATTENTION, _no_attention)
AttentionMaskInterface.register(ATTENTION, _padding_mask)
AttentionInterface.register(_ATTENTION_WITH_MASK, _no_attention)
AttentionMaskInterface.register(_ATTENTION_WITH_MASK, _always_a_mask)

_RECURRENT_TYPES = ("linear_attention", "conv", "mamba")
"""Types of blocks for which a base model makes a mask of the new tokens only."""


def build_head(
    checkpoint: Checkpoint,
    blocks: nn.Module,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    mixin: type | None = None,
    kind: HeadKind = CAUSAL,
) -> PreTrainedModel:
    """Build the architecture's own language model, or another of its models, with `blocks` in place of all
    layers.

    Only the tensors that are in no block are read. Parameters are frozen, the model is in evaluation mode,
    and its generation config is the checkpoint's where it has one.

    Args:
        blocks: called as `blocks(hidden, **kwargs)` with `hidden` of `[batch, tokens, hidden]` and what
            transformers passes to a decoder layer, among it `past_key_values` (None without a cache; by this
            name in all architectures),
            `attention_mask`: bool `[batch, past + tokens]`, false at padding, or None, and `position_ids`
            (`[batch or 1, tokens]`, or missing where blocks need none). Returns a tensor of the shape of
            `hidden`.
        dtype: "auto" is float32 on a CPU and the checkpoint's own dtype on an accelerator.
        mixin: a class that the model is an instance of besides, before the architecture's own. Its `__init__`
            is not called.
        kind: one of the architecture's models; its causal language model if not given. Parameters that the
            checkpoint does not have (a classifier's) are new, and trainable.

    Raises:
        ModelError: weights are missing, unknown or of a wrong shape, or the architecture is not supported.
    """
    anatomy = anatomy_of(checkpoint.config)
    model_class = kind.class_of(checkpoint.config, anatomy)
    # Lists with an entry per layer are not cut: models look at them for the masks that they will need.
    config = copy.deepcopy(checkpoint.config)
    config.num_hidden_layers = 0
    for name, value in kind.config.items():
        setattr(config, name, value)
    if hasattr(config, "quantization_config"):
        # Only weights inside blocks are stored quantised.
        del config.quantization_config
    keys = kind.keys(checkpoint, model_class, config)
    if StoredQuantisation.of(checkpoint.config):
        strange = sorted(set(keys.values()) - set(skeleton_of(model_class, config).state_dict()))
        if strange:
            raise ModelError(
                f"{checkpoint.name} stores weights quantised that are in no block ({strange[0]}), which this "
                "version does not load. Give a checkpoint whose embeddings and output layer are not "
                "quantised."
            )
    tensors = {keys[key]: tensor for key, tensor in checkpoint.read(keys).items()}
    fresh = kind.fresh(model_class, config, tensors)
    model = load_model(
        model_class,
        config,
        tensors | fresh,
        dtype=resolve_dtype(dtype, checkpoint.config, device),
        device=device,
        name=checkpoint.name,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind.is_trainable(name))
    _speak_for_blocks(blocks, anatomy)
    base: Any = model.get_submodule(base_path(model, anatomy))
    replace(base, anatomy.layers, nn.ModuleList([blocks]))
    holder: Any = base.get_submodule(anatomy.layers.rpartition(".")[0])
    # The causal model and its parts share one config, except where the base model must look at another one.
    model.config._attn_implementation = (
        ATTENTION if anatomy.uses_attention_interface else _ATTENTION_WITH_MASK
    )
    types = getattr(config, "layer_types", None)
    if types and types[0] in _RECURRENT_TYPES:
        holder.config = copy.copy(model.config)
        holder.config.layer_types = ["full_attention", *types[1:]]
    part: Any
    for part in (model, base, holder):
        part.config.num_hidden_layers = checkpoint.num_blocks
    # The config has the name that users write; PEFT asks the model itself for a place to load it from.
    model.config._name_or_path = checkpoint.name
    model.name_or_path = checkpoint.config._name_or_path
    if model.can_generate():
        _set_generation_config(model, checkpoint)
    # MPT's configs say otherwise, which would send the whole sequence through the swarm for every token.
    model.config.use_cache = holder.config.use_cache = True
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True
    if mixin is not None:
        # Only now: the mixin may have a `from_pretrained` of its own, which is not the one that loads.
        # It bears the architecture's own name, by which pipelines, the Trainer and others know what it is.
        namespace = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
        model.__class__ = type(model_class.__name__, (mixin, model_class), namespace)
    return model


def _speak_for_blocks(blocks: nn.Module, anatomy: Anatomy) -> None:
    """Let `blocks` be called, and return, in the architecture's way."""

    def usual_names(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(anatomy.arguments, args, strict=False)) | kwargs
        hidden = named.pop(anatomy.arguments[0])
        caches = [named.pop(name) for name in CACHE_ARGUMENTS if name in named]
        given = [cache for cache in caches if cache is not None]
        if len(given) > 1:
            # A model passes on arguments that it does not know, beside the empty cache that it has made.
            raise UsageError(
                f"this model's cache is given as {anatomy.cache_argument}=…, and by no other name"
            )
        if caches:
            named["past_key_values"] = given[0] if given else None
        return (hidden,), named

    blocks.register_forward_pre_hook(usual_names, with_kwargs=True)
    if anatomy.returns_tuple:
        blocks.register_forward_hook(lambda module, args, out: (out,))


def load_local(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load the ordinary model on this machine, as transformers does; a swarm must agree with it.

    Args:
        dtype: or another precision (`int8`, `nf4`), in which all of it is kept but the output layer.

    Raises:
        ModelError: transformers cannot load it.
    """
    where, options = checkpoint.files.pretrained()
    precision = Precision.parse(dtype, checkpoint.config, device)
    if checkpoint.is_part:
        return _load_part(checkpoint, precision, device)
    config = copy.deepcopy(checkpoint.config)
    if stored := StoredQuantisation.of(config):
        config.quantization_config = stored.loading()
    if precision.quantized:
        options["quantization_config"] = precision.quantization_config()
    if stored or precision.quantized:
        options["device_map"] = {"": torch.device(device)}
    options |= {"config": config, "dtype": precision.dtype, "trust_remote_code": False}
    try:
        with loader():
            model: Any = AutoModelForCausalLM.from_pretrained(where, **options)
    except Exception as error:
        raise ModelError(f"transformers cannot load {checkpoint.name}: {reason_of(error)}") from error
    if not precision.quantized:  # else it is there, and cannot be moved
        model.to(device)
    model.eval()
    model.requires_grad_(False)
    loaded: PreTrainedModel = model
    return loaded


def _load_part(checkpoint: Checkpoint, precision: Precision, device: str | torch.device) -> PreTrainedModel:
    """Load a language model that is a part of the model in the checkpoint."""
    anatomy = anatomy_of(checkpoint.config)
    names = checkpoint.head_keys()
    for key, name in checkpoint.block_keys(0, checkpoint.num_blocks).items():
        names[key] = f"{anatomy.prefix}.{name}"
    tensors = {names[key]: tensor for key, tensor in checkpoint.read(names).items()}
    config = copy.deepcopy(checkpoint.config)
    if stored := StoredQuantisation.of(config):
        config.quantization_config = stored.loading()
        tensors = stored.prepare(tensors, precision.dtype)
    return load_model(
        anatomy.causal_class,
        config,
        tensors,
        dtype=precision.dtype,
        device=device,
        quantization=precision.quantization_config(),
        name=checkpoint.name,
    )


def _set_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    path = checkpoint.files.find("generation_config.json")
    if path is None:
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(str(path.parent))
    except Exception as error:
        raise ModelError(f"generation_config.json of {checkpoint.name} cannot be used: {error}") from error
