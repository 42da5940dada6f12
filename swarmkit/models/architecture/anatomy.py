"""The parts of an architecture, found by looking at a skeleton of it, and cutting its config.

Nothing here is written per architecture: a skeleton of one block on the meta device (no memory, a few
milliseconds) shows the name of the list of blocks and the modules around it.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from swarmkit.errors import ModelError
from swarmkit.models.architecture.quirks import BLOCK_INDICES, FAMILIES, LEADING_BLOCKS, family_of

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params", "layer_past", "past_key_value")
"""Names of the argument by which models and their blocks are given a cache; in transformers 5.24
`past_key_values` became `cache` in most of them."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of one architecture.

    Attributes:
        base_class: e.g. `LlamaModel`.
        causal_class: e.g. `LlamaForCausalLM`.
        prefix: the base model's name inside the causal model, e.g. "model".
        layers: the path of the list of blocks inside the base model, e.g. "layers" or "decoder.layers".
        outside: paths inside the base model of the modules before and after the blocks: embeddings, norms and
            projections. They belong to the head.
        arguments: names of a block's positional arguments, the hidden states first.
        returns_tuple: whether the base model expects a tuple from a block, rather than a tensor.
        cache_argument: name of the argument by which the base model is given a cache.
    """

    base_class: type[PreTrainedModel]
    causal_class: type[PreTrainedModel]
    prefix: str
    layers: str
    outside: tuple[str, ...]
    arguments: tuple[str, ...]
    returns_tuple: bool
    cache_argument: str

    def block_of(self, key: str) -> tuple[int, str] | None:
        """The block a checkpoint key belongs to and the key inside that block; None for the head's keys."""
        found = re.match(rf"(?:{re.escape(self.prefix)}\.)?{re.escape(self.layers)}\.(\d+)\.(.+)", key)
        return (int(found[1]), found[2]) if found else None

    @property
    def uses_attention_interface(self) -> bool:
        """Whether it attends through transformers' attention interface, which can do without a mask."""
        return bool(self.base_class._supports_attention_backend)

    def neutralise(self, base: PreTrainedModel) -> None:
        """Let hidden states pass the modules outside the blocks unchanged; those are the head's."""
        for path in self.outside:
            part = base.get_submodule(path)
            replace(base, path, _NoEmbedding() if isinstance(part, nn.Embedding) else nn.Identity())


class _NoEmbedding(nn.Module):
    """Stands in place of learned positions, and adds nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        return torch.zeros((), device=None if given is None else given.device)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path in `model`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def anatomy_of(config: PreTrainedConfig) -> Anatomy:
    """Return the parts of the architecture that `config` describes.

    Raises:
        ModelError: the architecture is not supported.
    """
    family_of(config.model_type)
    if "dynamic" in rope_types(getattr(config, "rope_parameters", None)):
        # Their state belongs to the model, not to a session: one session would change the keys of the next.
        raise ModelError(
            f"This {config.model_type!r} model has rotary embeddings of the type 'dynamic', which change "
            "while a session grows, so that its blocks cannot be shared. Choose a model with another type, "
            "such as yarn."
        )
    # Which parts there are may depend on the config as well (OPT's projections, for instance).
    key = json.dumps(stage_config(config, 0, 1).to_dict(), sort_keys=True, default=str)
    known = _KNOWN.get(key)
    if known is None:
        known = _KNOWN[key] = _look(config)
    return known


_KNOWN: dict[str, Anatomy] = {}


def rope_types(parameters: Any) -> set[str]:
    """The types of rotary embeddings; some models have one for each type of block."""
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters.get("rope_type"))}
    return own.union(*(rope_types(value) for value in parameters.values()))


def _look(config: PreTrainedConfig) -> Anatomy:
    base_class: Any = MODEL_MAPPING.get(type(config), None)
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(base_class, type) or not isinstance(causal_class, type):
        raise ModelError(
            f"{config.model_type!r} models cannot be cut into blocks: transformers has no causal language "
            f"model for them. Choose a model of one of these types: {', '.join(sorted(FAMILIES))}."
        )
    name = base_class.__name__
    cut = stage_config(config, 0, 1)
    causal = skeleton_of(causal_class, cut)
    prefixes = [prefix for prefix, part in causal.named_modules() if type(part) is base_class]
    if len(prefixes) != 1 or not prefixes[0]:
        raise ModelError(f"{causal_class.__name__} does not contain one {name}; it cannot be cut.")
    base = causal.get_submodule(prefixes[0])
    # Experts may lie in lists too; those are inside the blocks.
    lists = [path for path, part in base.named_modules() if isinstance(part, nn.ModuleList)]
    lists = [path for path in lists if not any(path.startswith(f"{outer}.") for outer in lists)]
    blocks: Any = base.get_submodule(lists[0]) if len(lists) == 1 else ()
    if len(blocks) != 1:
        raise ModelError(f"{name} does not keep its blocks in one list; it cannot be cut.")
    parent = lists[0].rpartition(".")[0]
    outside = tuple(
        f"{parent}.{child}" if parent else child
        for child, part in base.get_submodule(parent).named_children()
        if isinstance(part, nn.Embedding | nn.Linear) or "norm" in type(part).__name__.lower()
    )
    parameters = inspect.signature(type(blocks[0]).forward).parameters
    arguments = tuple(parameters)[1:]
    # Where transformers records intermediate results by itself, blocks need not hand them on in a tuple.
    returns_tuple = not getattr(base_class, "_can_record_outputs", None)
    return Anatomy(
        base_class,
        causal_class,
        prefixes[0],
        lists[0],
        outside,
        arguments,
        returns_tuple,
        cache_argument(base_class),
    )


def cache_argument(model_class: type[nn.Module]) -> str:
    """Return the name by which the model's own forward function takes a cache.

    Its decorators may allow older names besides.

    Raises:
        ModelError: it takes none.
    """
    parameters = inspect.signature(inspect.unwrap(model_class.forward)).parameters
    name = next((name for name in CACHE_ARGUMENTS if name in parameters), None)
    if name is None:
        raise ModelError(f"{model_class.__name__} takes no cache, so that no session can be kept of it.")
    return name


def skeleton_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Make a model of `config` without memory for its weights."""
    with torch.device("meta"):
        return model_class(config)


def slice_config(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    """A copy of `config` that describes only blocks `[start, stop)`, renumbered from 0."""
    cut = copy.deepcopy(config)
    total = config.num_hidden_layers
    indices = list(BLOCK_INDICES)
    if getattr(config, "mlp_only_layers", None) is not None and hasattr(config, "decoder_sparse_step"):
        # These two say together which blocks are dense; the first alone can say it too.
        step, only = config.decoder_sparse_step, config.mlp_only_layers
        cut.mlp_only_layers = [i - start for i in range(start, stop) if i in only or (i + 1) % step]
        cut.decoder_sparse_step = 1
    for name in LEADING_BLOCKS:
        if isinstance(getattr(config, name, None), int):
            setattr(cut, name, max(0, getattr(config, name) - start))
    for name in indices:
        if isinstance(getattr(config, name, None), list):
            setattr(cut, name, [i - start for i in getattr(config, name) if start <= i < stop])
    for name, value in vars(config).items():
        per_block = isinstance(value, list | tuple) and len(value) == total and "layer" in name
        if per_block and name not in (*indices, "mlp_only_layers"):
            setattr(cut, name, value[start:stop])
    cut.num_hidden_layers = stop - start
    return cut


def stage_config(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    """The config of the truncated base model that serves blocks `[start, stop)`.

    A stage has no vocabulary: its embedding table is one row, which is never read.
    """
    cut = slice_config(config, start, stop)
    cut.vocab_size = 1
    cut.pad_token_id = cut.bos_token_id = cut.eos_token_id = 0
    for name, value in family_of(config.model_type).stage_config.items():
        setattr(cut, name, value)
    return cut


def block_numel(config: PreTrainedConfig) -> int:
    """Number of parameters of the largest block."""
    blocks = block_skeletons(config)
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def block_skeletons(config: PreTrainedConfig) -> list[nn.Module]:
    """Make one block of each kind (dense and sparse, for instance), without memory for its weights."""
    anatomy = anatomy_of(config)
    return [
        skeleton_of(anatomy.base_class, cut).get_submodule(anatomy.layers) for cut in block_configs(config)
    ]


def block_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configs of stages of one block, one for each kind of block."""
    kinds: dict[str, PreTrainedConfig] = {}
    for block in range(config.num_hidden_layers):
        cut = stage_config(config, block, block + 1)
        kinds.setdefault(json.dumps(cut.to_dict(), sort_keys=True, default=str), cut)
    return list(kinds.values())


def resolve_dtype(dtype: str | torch.dtype | None, config: Any, device: str | torch.device) -> torch.dtype:
    """Return the dtype to compute in: "auto" is float32 on a CPU and the checkpoint's own on an accelerator.

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
