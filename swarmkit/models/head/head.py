"""The part of a model that stays with the client: embeddings, final norm, output layer, and `generate`.

It is the ordinary causal language model of the architecture, except that its list of decoder layers holds one
module that stands for all of them.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
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
from swarmkit.models.kernels.few_rows import fastest_ways, multiply_rows
from swarmkit.models.kernels.rows_together import ways_together
from swarmkit.models.loading import load_model, loader
from swarmkit.models.quantization.precision import Precision
from swarmkit.models.quantization.stored import StoredQuantisation

logger = logging.getLogger(__name__)

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
    if kind.name == "causal":
        JointLinear.adopt(model.get_output_embeddings())
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


MOST_JOINT_ROWS = 32
"""Rows of one product for several threads; who has more computes them alone, and nobody waits for that."""
LONGEST_WAIT_S = 10.0
"""For a product that is under way. It takes a hundredth of that, unless its thread was interrupted."""


class JointLinear(nn.Linear):
    """A model's output layer, which computes the rows of several threads in one product.

    Threads that generate at the same time would each read all of its weights for each of their tokens. Here
    one that finds no product under way computes at once. Those that come meanwhile wait until it is done, and
    then one of them computes the rows of all, if that is faster on this machine. A product of a few rows is
    computed in the way that is the fastest here (`few_rows`): each thread gets what it would get from
    `nn.Linear` but for the order of additions. Where gradients are wanted, and elsewhere than on a CPU, each
    thread computes alone, as `nn.Linear` does.
    """

    _turns: _Turns

    @classmethod
    def adopt(cls, layer: object) -> None:
        """Make a plain linear layer one of these. It remains the same module, with the same parameters."""
        if type(layer) is nn.Linear:
            layer.__class__ = cls
            layer._turns = _Turns()  # type: ignore[assignment]
            if layer.weight.device.type == "cpu":  # what is measured once on a machine: now, not at a token
                fastest_ways(*layer.weight.shape, layer.weight.dtype, torch.get_num_threads())

    @property
    def num_waiting(self) -> int:
        """How many threads wait for a product now."""
        return self._turns.num_waiting

    def forward(self, input: Tensor) -> Tensor:
        """Compute the logits `[..., out]` of hidden states `[..., in]`."""
        if self._is_joint(input):
            return self._turns.product(self, input)
        return functional.linear(input, self.weight, self.bias)

    def _is_joint(self, input: Tensor) -> bool:
        """Whether these rows may be computed with those of other threads, by any of them."""
        weight = self.weight
        if torch.compiler.is_compiling() or type(input) is not Tensor or input.device.type != "cpu":
            return False
        if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            return False
        return (
            weight.device.type == "cpu"
            and input.dtype == weight.dtype
            and input.shape[-1:] == weight.shape[1:]
            and 0 < input.numel() <= MOST_JOINT_ROWS * weight.shape[1]
            and not torch.is_autocast_enabled("cpu")
        )


class _WaitingRows:
    """The rows `[rows, in]` of a thread that waits.

    Attributes:
        turn: released when it need not wait any longer. Then it has its logits, or is to compute those of a
            group, or its own. A lock, since an interrupt may break the lock inside of an event.
        group: all whose rows it is to compute, itself first.
        logits: `[rows, out]`.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.turn = threading.Lock()
        self.turn.acquire()
        self.group: list[_WaitingRows] = []
        self.logits: Tensor | None = None


class _Turns:
    """Who of several threads computes a layer's next product, and for whom."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_under_way = False
        self._waiting: list[_WaitingRows] = []

    def __reduce__(self) -> tuple[type[_Turns], tuple[()]]:
        """A copy of a layer has turns of its own."""
        return _Turns, ()

    @property
    def num_waiting(self) -> int:
        """How many threads wait for a product that has not begun."""
        return len(self._waiting)

    def product(self, layer: nn.Linear, input: Tensor) -> Tensor:
        """The product of `input` `[..., in]` with a layer's weights, computed here or in another thread."""
        is_first = False
        try:  # from here on, since an interrupt may come at any point
            with self._lock:
                is_first = not self._is_under_way
                self._is_under_way = True
            if is_first:
                return _product_alone(layer, input)
        finally:
            if is_first:
                self._pass_on()
        weight = layer.weight
        outputs, inputs = weight.shape
        way_of = ways_together(outputs, inputs, weight.dtype, torch.get_num_threads())
        if way_of is None:
            return _product_alone(layer, input)
        waits = _WaitingRows(input.reshape(-1, input.shape[-1]))
        self._wait(waits)
        if waits.group:
            self._compute(layer, waits.group, way_of)
        if waits.logits is None:  # the product of all failed: whose fault it was is found out so
            return _product_alone(layer, input)
        # A copy, so that nobody keeps the others' logits in memory, and of the kind of this thread's mode.
        return waits.logits.clone().view(*input.shape[:-1], -1)

    def _wait(self, waits: _WaitingRows) -> None:
        """Wait until the rows' turn has come, which is when the product that is under way has ended."""
        try:
            with self._lock:
                if not self._is_under_way:
                    waits.group = [waits]
                    self._is_under_way = True
                    return
                self._waiting.append(waits)
            if not waits.turn.acquire(timeout=LONGEST_WAIT_S) and self._withdraw(waits):
                self._is_under_way = False  # whoever was to end it was interrupted there, and never will
        except BaseException:
            self._withdraw(waits)
            if waits.group:
                self._end(waits.group)
            raise

    def _withdraw(self, waits: _WaitingRows) -> bool:
        """Wait no longer; whether it was still waiting for a product that had not begun."""
        with self._lock:
            is_waiting = waits in self._waiting
            if is_waiting:
                self._waiting.remove(waits)
            return is_waiting

    def _compute(self, layer: nn.Linear, group: Sequence[_WaitingRows], way_of: Sequence[str]) -> None:
        """Compute the rows of a group; without success its threads have none, and compute their own."""
        try:
            rows = torch.cat([each.rows for each in group])
            with torch.no_grad():
                logits = multiply_rows(rows, layer.weight, layer.bias, way_of)
            for each, part in zip(group, logits.split([len(each.rows) for each in group]), strict=True):
                each.logits = part
        except Exception:
            logger.warning("the rows of %d threads failed together", len(group), exc_info=True)
        finally:
            self._end(group)

    def _end(self, group: Sequence[_WaitingRows]) -> None:
        """The product of a group has ended, or will not be."""
        for each in group[1:]:
            each.turn.release()
        self._pass_on()

    def _pass_on(self) -> None:
        """A product has ended: have the next one computed, if anybody waits for it."""
        with self._lock:
            group: list[_WaitingRows] = []
            total = 0
            while self._waiting and total + len(self._waiting[0].rows) <= MOST_JOINT_ROWS:
                total += len(self._waiting[0].rows)
                group.append(self._waiting.pop(0))
            if not group:
                self._is_under_way = False
                return
            group[0].group = group
        group[0].turn.release()


def _product_alone(layer: nn.Linear, input: Tensor) -> Tensor:
    """The product of a thread's own rows `[..., in]`."""
    weight = layer.weight
    way_of = fastest_ways(*weight.shape, weight.dtype, torch.get_num_threads())
    if not way_of:
        return functional.linear(input, weight, layer.bias)
    with torch.no_grad():
        logits = multiply_rows(input.reshape(-1, input.shape[-1]), weight, layer.bias, way_of)
    return logits.view(*input.shape[:-1], -1)


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
