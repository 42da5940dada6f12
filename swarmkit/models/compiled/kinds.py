"""Kinds of blocks. Blocks of one kind differ in nothing but the values of their weights.

So one compiled program serves all blocks of a kind, with their weights among its arguments. A kind is
described by plain data: another process makes such a block from the description, without any weights, and
compiles its decode step (`build`). If the block that it makes is described otherwise, it says so, and nothing
is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from swarmkit.errors import ModelError
from swarmkit.models.architecture.anatomy import anatomy_of, skeleton_of, slice_config, stage_config
from swarmkit.models.execution.stage import Stage
from swarmkit.models.kernels.blocked_linear import BlockedLinear
from swarmkit.models.kernels.few_rows import FewRowsLinear

MOST_KINDS = 4
"""Of one stage. Each is compiled by itself, and models have one, or two that take turns."""
LEAST_SEEN = 2
"""Tokens that a decode step attends to at least: one from before, and its own."""
_OF_A_PLACE = {"training", "layer_idx", "layer_index", "layer_id", "block_idx"}
"""Attributes of modules that say where a block is, not what it is."""


class NotCompiledError(ModelError):
    """A decode step cannot be compiled, or not be used; the message says why."""


@dataclass(frozen=True)
class BlockKind:
    """What is to be known of a block to compile its decode step."""

    config: str
    """The config, in JSON, of a stage that has this block alone."""
    attention: str
    """Name of the attention implementation."""
    dtype: str
    hidden_size: int
    weights: tuple[tuple[str, tuple[int, ...], str], ...]
    """Name, shape and dtype of each parameter and buffer, in the order of the program's arguments."""
    linear: tuple[tuple[str, str, tuple[str, ...]], ...]
    """Path and form of each linear layer that is not transformers' own (see `kernels`), and the way
    of each number of rows."""
    traits: tuple[tuple[str, str], ...]
    """Class of each module, and all its attributes that are numbers or text."""
    rooms: tuple[tuple[int, int], ...]
    """Heads and dimensions of the block's keys, and of its values."""

    @property
    def text(self) -> str:
        """All of it, in JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def digest(self) -> str:
        """A name for it: a hash of all of it."""
        return sha256(self.text.encode()).hexdigest()

    @classmethod
    def parse(cls, text: str) -> BlockKind:
        """Read what `text` wrote."""
        return cls(**{name: _in_tuples(value) for name, value in json.loads(text).items()})

    def make_config(self) -> PreTrainedConfig:
        """The config of a stage that has such a block alone."""
        values = json.loads(self.config)
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of hidden states, keys and values."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def difference_from(self, other: BlockKind) -> str:
        """The first part in which another kind differs, in words; empty if none does."""
        for name, mine in asdict(self).items():
            others = asdict(other)[name]
            if mine != others and isinstance(mine, tuple):
                odd = sorted(set(mine) ^ set(others), key=str)
                return f"{name}: {odd[0] if odd else 'the order'}"
            if mine != others:
                return name
        return ""


def _in_tuples(value: Any) -> Any:
    return tuple(_in_tuples(one) for one in value) if isinstance(value, list) else value


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a stage of one block, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def make_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A stage with the one block of a config, without memory for its weights."""
    anatomy = anatomy_of(config)
    base = skeleton_of(anatomy.base_class, stage_config(config, 0, 1))
    anatomy.neutralise(base)
    return base.train(False).requires_grad_(False)


def describe(
    model: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype, rooms: Sequence[tuple[int, int]]
) -> BlockKind:
    """The kind of the block that is the only one of a base model.

    Args:
        config: of a stage with this block alone. What the base model has around the block, and a stage of
            this block alone has not (rotary embeddings of other blocks), is left out.
        rooms: see `BlockKind`.
    """
    skeleton, layers = make_skeleton(config), f"{anatomy_of(config).layers}.0."
    known = {*weights_of(skeleton)} | {
        f"{path}.{name}" for path, module in skeleton.named_modules() for name in vars(module)
    }
    weights, traits = [], []
    linear: list[tuple[str, str, tuple[str, ...]]] = []
    for name, weight in weights_of(model).items():
        if not name.startswith(layers) and name not in known:
            continue
        weights.append((name, tuple(weight.shape), _name_of(weight.dtype)))
    for path, module in model.named_modules():
        if isinstance(module, BlockedLinear):
            linear.append((path, "blocked", ()))
        elif isinstance(module, FewRowsLinear):
            linear.append((path, "few rows", tuple(module.way_of)))
        if not isinstance(module, nn.ModuleList):  # which may be a list of a view's own
            traits.append((path, f"{type(module).__module__}.{type(module).__qualname__}"))
        for name, value in vars(module).items():
            if name.startswith("_") or name in _OF_A_PLACE or isinstance(module, PreTrainedModel):
                continue
            where = f"{path}.{name}"
            if not where.startswith(layers) and where not in known:
                continue
            if value is None or isinstance(value, bool | int | float | str):
                traits.append((f"{path}.{name}", repr(value)))
    return BlockKind(
        config=_text_of(config),
        attention=model.config._attn_implementation,
        dtype=_name_of(dtype),
        hidden_size=config.hidden_size,
        weights=tuple(weights),
        linear=tuple(linear),
        traits=tuple(sorted(traits)),
        rooms=tuple((heads, dim) for heads, dim in rooms),
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text_of(config: PreTrainedConfig) -> str:
    values: Mapping[str, Any] = config.to_dict()
    # Where a model came from, and by which version it was saved, is no part of what it is.
    left_out = ("_name_or_path", "transformers_version", "architectures")
    return json.dumps({k: v for k, v in values.items() if k not in left_out}, sort_keys=True, default=str)


@dataclass(frozen=True)
class StageKinds:
    """The kinds of a stage's blocks.

    Attributes:
        of_block: for each block of the stage, in order, the digest of its kind.
        kinds: by digest.
    """

    of_block: tuple[str, ...]
    kinds: Mapping[str, BlockKind]


@torch.inference_mode()
def kinds_of(stage: Stage) -> StageKinds:
    """Look at the blocks of a stage, and run two tokens through each to see what keys it has.

    Raises:
        NotCompiledError: the decode step of such blocks cannot be compiled; the message says why.
    """
    if stage.device.type != "cpu":
        raise NotCompiledError(f"decode steps are compiled for a CPU, and this stage is on {stage.device}")
    if stage.precision.stored is not None or stage.precision.quantized:
        raise NotCompiledError(f"decode steps are not compiled for weights in {stage.precision.name}")
    if not stage.runs_together:
        raise NotCompiledError("sessions cannot run together in blocks of this architecture")
    if not stage.view_of(stage.start, stage.stop).needs_no_mask(torch.empty(1, 1, stage.hidden_size), 1):
        raise NotCompiledError("these blocks need a mask for every token")
    of_block, kinds = [], {}
    for block in range(stage.start, stage.stop):
        cache = stage.new_cache(block, block + 1)
        stage.forward(torch.ones(1, 2, stage.hidden_size), cache)
        if not cache.has_pages:
            raise NotCompiledError("some blocks keep more than the keys and values of tokens")
        layer = cache.blocks[0]
        index = block - stage.start
        kind = describe(
            stage.view_of(block, block + 1).model,
            slice_config(stage.base.config, index, index + 1),
            stage.dtype,
            [(part.shape[1], part.shape[3]) for part in (layer.keys, layer.values)],
        )
        of_block.append(kind.digest)
        kinds[kind.digest] = kind
    if len(kinds) > MOST_KINDS:
        raise NotCompiledError(
            f"these blocks are of {len(kinds)} kinds, and {MOST_KINDS} at most are compiled"
        )
    return StageKinds(tuple(of_block), kinds)
