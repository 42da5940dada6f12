"""Steps of several sessions in one forward pass.

A linear layer reads all its weights however few tokens it is given, so that eight sessions cost little more
than one if their tokens go through it together. Only attention cannot be shared: every session attends to its
own past. So the tokens of all sessions lie behind one another in a batch of one, the *packed batch*::

    hidden  [1, total, hidden]    total = sum of rows x tokens over the sessions
    row     |a a a a|b|c c|       a: prefill, b: decode, c: two rows that decode

The packed batch is also the cache that the blocks are given: it appends to each session's own. The attention
function that they find in place of theirs (through transformers' `AttentionInterface`) calls theirs session
by session, with just the queries, keys, values and mask that it would have for that session alone.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swarmkit.models.adapters.hooks import AdapterHooks, Segment
from swarmkit.models.architecture.anatomy import Anatomy, rope_types
from swarmkit.models.architecture.quirks import FAMILIES
from swarmkit.models.execution.view import with_blocks
from swarmkit.models.kv.cache import StageCache

_FEW_TOKENS = 16
"""Steps of more tokens than this read keys that heads share often enough as it is."""
_PACKED = "swarmkit-packed"
"""Name of the attention implementation below. transformers has no mask function of that name, so it makes no
mask."""


@dataclass(frozen=True, eq=False)
class StepPart:
    """One session's step, or a chunk of it: the arguments of `Stage.forward`."""

    hidden: Tensor
    """Hidden states of the new tokens, `[rows, tokens, hidden]`."""
    cache: StageCache
    attention_mask: Tensor | None = None
    """`[rows, past + tokens]`, false or 0 at padding; None: no padding."""
    position_ids: Tensor | None = None
    """`[rows, tokens]` or `[1, tokens]`; None: counted from the past."""

    def to(self, device: torch.device, dtype: torch.dtype) -> StepPart:
        """The same step, with hidden states of this device and dtype."""
        return dataclasses.replace(self, hidden=self.hidden.to(device, dtype))


def can_be_packed(config: PreTrainedConfig, anatomy: Anatomy) -> bool:
    """Whether sessions may run together in blocks without a recurrent state: only where that was tried.

    With "longrope" all tokens of a batch are rotated by the position of the furthest: one session's length
    would change the keys of another.
    """
    listed = config.model_type in FAMILIES and anatomy.uses_attention_interface
    return listed and "longrope" not in rope_types(getattr(config, "rope_parameters", None))


class PackedView:
    """Some blocks of a model, called with steps of several sessions at once.

    Attributes:
        model: the base model with these blocks alone, which attends as a packed batch does.
        attention: name of the blocks' own attention implementation.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, adapters: AdapterHooks) -> None:
        self._forward = inspect.unwrap(type(model).forward)
        self._cache_argument = anatomy.cache_argument
        self._adapters = adapters
        self.model = _with_attention(model, _PACKED, {})
        self._masks = _MaskMaker(model, anatomy)
        self.attention: str = model.config._attn_implementation

    def __call__(self, parts: Sequence[StepPart], need_masks: Sequence[bool]) -> list[Tensor]:
        """Run checked parts, all of the device and dtype of the blocks, and append to their caches.

        Args:
            need_masks: for each part, whether it needs a mask, as it does not attend to all of its past.

        Returns:
            `[rows, tokens, hidden]` for each part.
        """
        asked = zip(parts, need_masks, strict=True)
        masks = [self._masks(part) if needed else None for part, needed in asked]
        batch = _StepBatch(parts, masks, self.attention)
        positions = torch.cat([_positions(part) for part in parts])
        segments = [
            Segment.of(part.cache.adapter, part.hidden, part.cache.tokens, part.cache.prompt_order)
            for part in parts
        ]
        first = parts[0].cache
        with self._adapters.applied(first.start, first.stop, segments):
            out = self.run(torch.cat([part.hidden.flatten(0, 1) for part in parts]), positions, batch)
        pieces = out.split(batch.sizes)
        return [piece.view(part.hidden.shape) for piece, part in zip(pieces, parts, strict=True)]

    def run(self, hidden: Tensor, positions: Tensor, batch: PackedBatch) -> Tensor:
        """Run the blocks over tokens `[total, hidden]` at positions `[total]`; returns `[total, hidden]`."""
        out: Tensor = self._forward(
            self.model,
            inputs_embeds=hidden[None],
            position_ids=positions[None],
            use_cache=True,
            **{self._cache_argument: batch},
        ).last_hidden_state
        return out[0]


class DecodePath(Protocol):
    """A quicker way for single tokens of sessions, where there is one: CUDA graphs, or compiled steps.

    Attributes:
        work: False once it cannot be used any more.
    """

    work: bool

    def run(
        self, blocks: tuple[int, int], view: PackedView, parts: Sequence[StepPart]
    ) -> list[Tensor] | None:
        """Run one token each of sessions of these blocks, whose caches hold it afterwards.

        Args:
            view: these blocks.
            parts: checked, of the blocks' device and dtype, with hidden states `[1, 1, hidden]`, nothing
                masked, counted positions, no adapter, and something in the cache.

        Returns:
            `[1, 1, hidden]` for each; None if that cannot be: then nothing has happened.
        """


def _positions(part: StepPart) -> Tensor:
    """The position of each token, row after row, `[rows x tokens]`."""
    rows, tokens, _ = part.hidden.shape
    device, past = part.hidden.device, part.cache.tokens
    if part.position_ids is None:
        return torch.arange(past, past + tokens, device=device).repeat(rows)
    return part.position_ids.to(device).expand(rows, tokens).flatten()


class PackedBatch:
    """Tokens of several sessions, as the cache of one batch: each session's keys and values go to its own
    cache.

    Attributes:
        sizes: number of tokens of each session, rows x tokens.
        attention: name of the blocks' own attention implementation.
        side_by_side: whether it has one token each of several sessions, as rows of one batch (see
            `cuda_graphs`).
    """

    side_by_side = False

    def __init__(self, shapes: Sequence[tuple[int, int]], attention: str) -> None:
        """Args: shapes: rows and tokens of each session."""
        self.sizes = [rows * tokens for rows, tokens in shapes]
        self.attention = attention
        self._shapes = shapes
        self._several_rows = any(rows > 1 for rows, _ in shapes)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append `[1, heads, total, dim]`; returns what the attention function below is given."""
        raise NotImplementedError

    def mask(self, number: int, block: int) -> Tensor | None:
        """The mask of session `number` in a block, by its index in the stage."""
        raise NotImplementedError

    def positions(self) -> Tensor:
        """Index of each token within its session, `[total]`."""
        raise NotImplementedError

    def split(self, packed: Tensor) -> Sequence[Tensor]:
        """Split `[1, heads, total, dim]` into `[rows, heads, tokens, dim]` for each session."""
        pieces = packed.split(self.sizes, dim=2)
        if not self._several_rows:
            return pieces
        return [
            piece if shape[0] == 1 else piece[0].unflatten(1, shape).transpose(0, 1)
            for piece, shape in zip(pieces, self._shapes, strict=True)
        ]

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """What to add to 0, 1, 2, ... for the position of each token; 0 for a model, which is given
        positions.

        Attention modules call this with their index. For each token they get its index within its session
        less its index within the packed batch.
        """
        if layer_idx is None:
            return 0
        positions = self.positions()
        return positions - torch.arange(len(positions), device=positions.device)


class _StepBatch(PackedBatch):
    """Steps of several sessions, each with a cache of its own."""

    def __init__(self, parts: Sequence[StepPart], masks: Sequence[list[Any] | None], attention: str) -> None:
        super().__init__([(part.hidden.shape[0], part.hidden.shape[1]) for part in parts], attention)
        self._parts = parts
        self._masks = masks

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        added = zip(self._parts, self.split(keys), self.split(values), strict=True)
        held = [part.cache.layers[layer_idx].update(new, more) for part, new, more in added]
        return BatchedKeys(self, [one for one, _ in held]), BatchedKeys(self, [other for _, other in held])

    def mask(self, number: int, block: int) -> Tensor | None:
        masks = self._masks[number]
        return None if masks is None else masks[block]

    def positions(self) -> Tensor:
        device = self._parts[0].hidden.device
        positions = [
            torch.arange(part.cache.tokens, part.cache.tokens + tokens, device=device).repeat(rows)
            for part, (rows, tokens) in zip(self._parts, self._shapes, strict=True)
        ]
        return torch.cat(positions)


class BatchedKeys(list[Tensor]):
    """Keys or values of each session, `[rows, heads, past + tokens, dim]`, and their packed batch."""

    def __init__(self, batch: PackedBatch, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self.batch = batch


def _attend(
    module: nn.Module,
    query: Tensor,
    key: BatchedKeys,
    value: BatchedKeys,
    attention_mask: None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in a packed batch: call the module's own attention function, session by session.

    Returns:
        `[1, total, heads, dim]`, and no weights.
    """
    batch = key.batch
    index: Any = module.layer_idx
    attend = _own_attention(module, batch.attention)
    quick = batch.attention == "sdpa" and (query.device.type == "cpu" or batch.side_by_side)
    outputs = []
    for number, (queries, keys, values) in enumerate(zip(batch.split(query), key, value, strict=True)):
        mask = batch.mask(number, index)
        if mask is None:
            shares, few = False, queries.shape[2] == 1
        else:
            shares = quick and _shares_keys(queries, keys, values, kwargs)
            few = shares and mask.shape[1] == 1 and queries.shape[2] <= _FEW_TOKENS
        if quick and few:
            out = _attend_with_few_tokens(queries, keys, values, mask, kwargs.get("scaling"))
        elif shares:
            # The module's own function would copy a whole session's keys for each head that shares them.
            out = nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=kwargs.get("scaling"), enable_gqa=True
            ).transpose(1, 2)
        else:
            out = attend(module, queries, keys, values, mask, **kwargs)[0]
        outputs.append(out.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _attend_with_few_tokens(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attend with query heads that share their keys as if they were more tokens of one head.

    It is the same sum, but reads each key once; on a CPU one token in bfloat16 takes a sixth of the time, and
    two in float32 half of it.

    Args: mask: `[rows, 1, tokens, past + tokens]`, or None.
    """
    rows, heads, tokens, _ = query.shape
    sharing = heads // keys.shape[1]
    if mask is not None and tokens > 1:
        mask = mask.repeat(1, 1, sharing, 1)
    grouped = query.reshape(rows, keys.shape[1], sharing * tokens, query.shape[3])
    out = nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(rows, heads, tokens, -1).transpose(1, 2)


def _shares_keys(query: Tensor, keys: Tensor, values: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether query heads share keys, and torch's own attention can do all that is wanted."""
    return (
        query.shape[1] > keys.shape[1]
        and keys.shape[3] == values.shape[3]
        and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
    )


AttentionInterface.register(_PACKED, _attend)


def _own_attention(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that the module would have called; "eager" is each architecture's own."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return found


def _expand_each(
    expand: Callable[..., tuple[Tensor, Tensor]], latent: BatchedKeys, rotary: BatchedKeys
) -> Any:
    """Expand what latent attention has cached to keys and values, session by session."""
    made = [expand(one, other) for one, other in zip(latent, rotary, strict=True)]
    return BatchedKeys(latent.batch, [keys for keys, _ in made]), BatchedKeys(
        latent.batch, [values for _, values in made]
    )


def _with_attention(module: Any, name: str, configs: dict[int, Any]) -> Any:
    """A copy of a module that shares all weights and attends by another implementation.

    Modules without a config are not copied, unless one inside them has one.
    """
    children = {
        path: None if child is None else _with_attention(child, name, configs)
        for path, child in module._modules.items()
    }
    config = getattr(module, "config", None)
    if config is None and all(module._modules[path] is child for path, child in children.items()):
        return module
    same = copy.copy(module)
    same._modules = children
    if config is not None:
        if id(config) not in configs:
            configs[id(config)] = copy.copy(config)
            configs[id(config)]._attn_implementation = name
        same.config = configs[id(config)]
    if hasattr(module, "expand_kv"):
        same.expand_kv = partial(_expand_each, module.expand_kv)
    return same


class _MaskMaker:
    """Finds the mask that each block would be given for one session's step, whatever the architecture.

    The model's own forward function runs, with blocks that only note the mask that they are given.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self._forward = inspect.unwrap(type(model).forward)
        self._cache_argument = anatomy.cache_argument
        self._arguments = anatomy.arguments
        self._returns_tuple = anatomy.returns_tuple
        self._taken: list[Any] = []
        blocks: Any = model.get_submodule(anatomy.layers)
        self._model = with_blocks(model, anatomy.layers, model.config, [self._instead_of(b) for b in blocks])

    def __call__(self, part: StepPart) -> list[Any]:
        """Return a mask (or None) for each block, by its index in the stage."""
        mask = part.attention_mask
        self._taken = [None] * part.cache.offset
        self._forward(
            self._model,
            inputs_embeds=part.hidden,
            attention_mask=None if mask is None else mask.to(part.hidden.device),
            position_ids=_positions(part).view(part.hidden.shape[:2]),
            use_cache=True,
            **{self._cache_argument: part.cache},
        )
        return self._taken

    def _instead_of(self, block: nn.Module) -> nn.Module:
        same = copy.copy(block)  # base models may look at a block's attributes
        same.forward = self._take
        return same

    def _take(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self._arguments, args, strict=False)) | kwargs
        self._taken.append(named["attention_mask"])
        hidden = named[self._arguments[0]]
        return (hidden,) if self._returns_tuple else hidden
