"""Where an architecture keeps its parts, found by looking at a skeleton of it; and cutting its config.

Nothing here is written per architecture: a one-block skeleton on the meta device (no memory, a few
milliseconds) shows what the list of blocks, the final norm and the embedding are called.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from swarmkit.errors import ModelError
from swarmkit.models.quirks import family_of


@dataclass(frozen=True)
class Anatomy:
    """The parts of one architecture.

    Attributes:
        base_class: e.g. `LlamaModel`.
        causal_class: e.g. `LlamaForCausalLM`.
        prefix: the base model's name inside the causal model, e.g. "model".
        layers: the block list's name inside the base model, e.g. "layers".
        norm: the final norm's name inside the base model, e.g. "norm".
    """

    base_class: type[PreTrainedModel]
    causal_class: type[PreTrainedModel]
    prefix: str
    layers: str
    norm: str

    def block_of(self, key: str) -> tuple[int, str] | None:
        """The block a checkpoint key belongs to and the key inside that block; None for the head's keys."""
        found = re.match(rf"(?:{re.escape(self.prefix)}\.)?{re.escape(self.layers)}\.(\d+)\.(.+)", key)
        return (int(found[1]), found[2]) if found else None


def anatomy_of(config: PreTrainedConfig) -> Anatomy:
    """The parts of the architecture that `config` describes.

    Raises:
        ModelError: the architecture is not supported.
    """
    family_of(config.model_type)
    known = _KNOWN.get(type(config))
    if known is None:
        known = _KNOWN[type(config)] = _look(config)
    return known


_KNOWN: dict[type[PreTrainedConfig], Anatomy] = {}


def _look(config: PreTrainedConfig) -> Anatomy:
    base_class: Any = MODEL_MAPPING[type(config)]
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    skeleton = skeleton_of(base_class, stage_config(config, 0, 1))
    names = list(skeleton._modules)
    lists = [name for name, child in skeleton.named_children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1 or len(skeleton.get_submodule(lists[0])) != 1:  # type: ignore[arg-type]
        raise ModelError(f"{base_class.__name__} does not keep its blocks in one list; it cannot be cut.")
    later = names[names.index(lists[0]) + 1 :]
    norms = [name for name in later if "norm" in name.lower() or name == "ln_f"]
    if len(norms) != 1:
        raise ModelError(f"{base_class.__name__} has no single norm after its blocks; it cannot be cut.")
    return Anatomy(base_class, causal_class, causal_class.base_model_prefix, lists[0], norms[0])


def skeleton_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config` without memory for its weights."""
    with torch.device("meta"):
        return model_class(config)


def slice_config(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    """A copy of `config` that describes only blocks `[start, stop)`, renumbered from 0."""
    cut = copy.deepcopy(config)
    total = config.num_hidden_layers
    if getattr(config, "mlp_only_layers", None) is not None and hasattr(config, "decoder_sparse_step"):
        # These two say by block *index* which blocks are dense, so they are rewritten for the new indices.
        step, only = config.decoder_sparse_step, config.mlp_only_layers
        cut.mlp_only_layers = [i - start for i in range(start, stop) if i in only or (i + 1) % step]
        cut.decoder_sparse_step = 1
    for name, value in vars(config).items():
        per_block = isinstance(value, list | tuple) and len(value) == total and "layer" in name
        if per_block and name != "mlp_only_layers":
            setattr(cut, name, value[start:stop])
    cut.num_hidden_layers = stop - start
    return cut


def stage_config(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    """The config of the truncated base model that serves blocks `[start, stop)`.

    A stage has no vocabulary: its embedding table is one row, which nobody reads.
    """
    cut = slice_config(config, start, stop)
    cut.vocab_size = 1
    cut.pad_token_id = cut.bos_token_id = cut.eos_token_id = None
    for name, value in family_of(config.model_type).stage_config.items():
        setattr(cut, name, value)
    return cut


def block_numel(config: PreTrainedConfig) -> int:
    """Parameters of the largest block. Blocks may differ (dense and sparse); each kind is looked at once."""
    anatomy = anatomy_of(config)
    kinds: dict[str, PreTrainedConfig] = {}
    for block in range(config.num_hidden_layers):
        cut = stage_config(config, block, block + 1)
        kinds.setdefault(json.dumps(cut.to_dict(), sort_keys=True, default=str), cut)
    blocks = [skeleton_of(anatomy.base_class, cut).get_submodule(anatomy.layers) for cut in kinds.values()]
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def resolve_dtype(dtype: str | torch.dtype | None, config: Any, device: str | torch.device) -> torch.dtype:
    """The dtype to compute in: "auto" is float32 on a CPU and the checkpoint's own on an accelerator.

    Raises:
        ModelError: `dtype` is not a floating point dtype.
    """
    if dtype in ("auto", None):
        if torch.device(device).type == "cpu":
            return torch.float32
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{dtype!r} is not a dtype to compute in. Use auto, float32, bfloat16 or float16.")
    return found
