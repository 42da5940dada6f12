"""A stage: some consecutive blocks of a model, as transformers' own base model, truncated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarmkit.errors import AdapterError, UsageError
from swarmkit.models.adapters.adapter import Adapter, Fittings, Tensors
from swarmkit.models.adapters.hooks import AdapterHooks, Segment
from swarmkit.models.architecture.anatomy import (
    Anatomy,
    anatomy_of,
    rope_types,
    slice_config,
)
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.attention_cost import AttentionCost
from swarmkit.models.execution.block_loading import load_blocks
from swarmkit.models.execution.cuda_graphs import StageGraphs, is_next_token
from swarmkit.models.execution.packed import DecodePath, PackedView, StepPart, can_be_packed
from swarmkit.models.execution.view import View, with_blocks
from swarmkit.models.kv.cache import StageCache
from swarmkit.models.quantization.precision import Precision

logger = logging.getLogger(__name__)

__all__ = ["Stage", "StageCache", "StepPart"]

DtypeLike: TypeAlias = torch.dtype | str | Literal["auto"]

CATCH_UP_TOKENS = 512


class Stage:
    """Blocks `[start, stop)` of a model.

    Not safe for use by several threads at once. Any number of sessions may share it, each with its own
    `StageCache`, also over different sub-ranges of its blocks.

    Attributes:
        start, stop: the half-open range of blocks.
        hidden_size: width of the hidden states.
        precision: how the weights are kept.
        dtype: of computations, caches and results.
        device: where it computes.
        attention_cost: of one block.
        keys_are_final: whether a token's keys are the same however long its session becomes.
        fittings: what adapters may attach to.
        runs_together: whether sessions run together, unless they have a recurrent state.
        decode_path: how single tokens run where that can be; None: as other steps. May be replaced.
    """

    def __init__(
        self, base: PreTrainedModel, anatomy: Anatomy, start: int, stop: int, precision: Precision
    ) -> None:
        self.start = start
        self.stop = stop
        self.hidden_size: int = base.config.hidden_size
        parameter = next(base.get_submodule(anatomy.layers).parameters())
        self.precision = precision
        self.dtype: torch.dtype = precision.dtype
        self.device: torch.device = parameter.device
        self._base = base
        self._anatomy = anatomy
        self._views: dict[tuple[int, int], View] = {}
        self.runs_together = can_be_packed(base.config, anatomy)
        keys = getattr(base.config, "num_key_value_heads", None)
        shares = keys is not None and keys != getattr(base.config, "num_attention_heads", None)
        self._packs_lone_steps = shares and self.runs_together and self.device.type == "cpu"
        self.keys_are_final = not {"dynamic", "longrope"} & rope_types(
            getattr(base.config, "rope_parameters", None)
        )
        self._packed_views: dict[tuple[int, int], PackedView] = {}
        self.decode_path: DecodePath | None = None
        layers: Any = base.get_submodule(anatomy.layers)
        self.attention_cost = AttentionCost.of(base.config, layers[0])
        blocks: dict[int, nn.Module] = dict(enumerate(layers, start))
        self.fittings = Fittings.of(blocks, self.hidden_size)
        self._adapters = AdapterHooks(blocks, anatomy.arguments[0])

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model whose only layers are these blocks."""
        return self._base

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        start: int,
        stop: int,
        *,
        dtype: DtypeLike = "auto",
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], None] | None = None,
        on_tensor: Callable[[], None] | None = None,
        will_compile: bool = False,
    ) -> Stage:
        """Load blocks `[start, stop)`, reading only their tensors (and fetching only the files they lie in).

        Args:
            dtype: a precision: float32, bfloat16, float16, int8 or nf4; "auto" is float32 on a CPU and the
                checkpoint's own dtype on an accelerator.
            progress: called with (blocks read so far, blocks in total), from this thread.
            on_tensor: called before each tensor is read, from several threads; what it raises ends the
                loading, with this error or another one.
            will_compile: whether decode steps will be compiled, so that weights stay in the order for it.

        Raises:
            UsageError: the range is empty or outside the model.
            ModelError: weights are missing, unknown or misshapen, or the architecture is not supported.
        """
        if not 0 <= start < stop <= checkpoint.num_blocks:
            raise UsageError(
                f"There are no blocks [{start}, {stop}): {checkpoint.name} has {checkpoint.num_blocks}, "
                f"so 0 <= start < stop <= {checkpoint.num_blocks}."
            )
        precision = Precision.parse(dtype, checkpoint.config, device)
        precision.ensure_available(checkpoint.name, device)
        base = load_blocks(checkpoint, start, stop, precision, device, progress, on_tensor, will_compile)
        return cls(base, anatomy_of(checkpoint.config), start, stop, precision)

    def enable_cuda_graphs(self, sessions: int, tokens: int) -> None:
        """From now on, run single tokens as CUDA graphs where that can be (see `cuda_graphs`).

        On a CPU nothing is recorded. Nothing changes where the precision does not allow it.

        Args:
            sessions: how many at once may run so; if more have a token at once, all run without.
            tokens: how long they may be; the keys and values of `sessions + 1` of that length are held.
        """
        self.decode_path = StageGraphs(sessions, tokens) if self.precision.allows_cuda_graphs else None

    def new_cache(self, start: int, stop: int, adapter: Adapter | None = None) -> StageCache:
        """An empty cache for one session that uses blocks `[start, stop)` of this stage.

        Args:
            adapter: of all steps of the session, its values on this device (`adapter.to(stage.device)`).

        Raises:
            UsageError: the range is empty or not within this stage, or the adapter does not fit it.
        """
        if not self.start <= start < stop <= self.stop:
            raise UsageError(
                f"Blocks [{start}, {stop}) are not all in this stage, which has [{self.start}, {self.stop})."
            )
        cache = StageCache(start, stop, offset=start - self.start, config=self.view_of(start, stop).config)
        cache.adapter = self._fitting(adapter, start, stop)
        return cache

    def forward(
        self,
        hidden: Tensor,
        cache: StageCache,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Run the cache's blocks over some new tokens, and append these to the cache.

        Args:
            hidden: `[batch, tokens, hidden]`, of any floating dtype.
            cache: from `new_cache`; it holds `past` tokens before this call and `past + tokens` after it.
                A call that raises leaves it as it was.
            attention_mask: `[batch, past + tokens]`, false or 0 at padding; None: no padding.
            position_ids: `[batch, tokens]` (or `[1, tokens]`); None: counted from `past`.

        Returns:
            `[batch, tokens, hidden]`, contiguous, of the stage's dtype and on its device.

        Raises:
            UsageError: shapes do not fit each other, the cache or the model.
        """
        self._check(hidden, cache, cache.tokens, attention_mask, position_ids)
        return self._forward(StepPart(hidden, cache, attention_mask, position_ids))

    def forward_many(self, parts: Sequence[StepPart]) -> list[Tensor | Exception]:
        """Run steps of several sessions, in one pass over the weights where the architecture can do that.

        Sessions over the same blocks run together, others one after the other. The results are those of
        `forward` for each alone, but for rounding: a matrix product may add up in another order when it has
        more rows.

        Args:
            parts: each of another session.

        Returns:
            For each part what `forward` returns, or what it raises; then its cache is as it was. A part that
            fails does not disturb the others.
        """
        results: dict[int, Tensor | Exception] = {}
        batches: dict[tuple[int, int], list[int]] = {}
        seen: set[StageCache] = set()
        for index, part in enumerate(parts):
            try:
                if part.cache in seen:
                    raise UsageError("A session has one step at a time; run its next one after this.")
                self._check(
                    part.hidden, part.cache, part.cache.tokens, part.attention_mask, part.position_ids
                )
            except UsageError as error:
                results[index] = error
                continue
            seen.add(part.cache)
            can = self.runs_together and not part.cache.recurrent
            blocks = (part.cache.start, part.cache.stop) if can else (-1, index)
            batches.setdefault(blocks, []).append(index)
        for indices in batches.values():
            results |= zip(indices, self._forward_batch([parts[index] for index in indices]), strict=True)
        return [results[index] for index in range(len(parts))]

    def _forward_batch(self, parts: list[StepPart]) -> list[Tensor] | list[Tensor | Exception]:
        """Run checked parts over the same blocks, in the quickest way that there is for them."""
        path = self.decode_path
        if path is not None and (outputs := self._forward_quickly(parts, path)) is not None:
            return outputs
        if len(parts) > 1 or self._is_quicker_packed(parts[0]):
            try:
                return self._forward_packed(parts)
            except Exception:
                logger.warning("%d steps failed together, and are run one by one", len(parts), exc_info=True)
        return [self._forward_alone(part) for part in parts]

    def _forward_alone(self, part: StepPart) -> Tensor | Exception:
        try:
            return self._forward(part)
        except Exception as error:  # noqa: BLE001 - it is the answer to this part
            return error

    @torch.inference_mode()
    def _forward(self, part: StepPart) -> Tensor:
        """Run one checked part by itself; if it raises, its cache is as it was."""
        cache, mask = part.cache, part.attention_mask
        past = cache.tokens
        view = self.view_of(cache.start, cache.stop)
        hidden = part.hidden.to(self.device, self.dtype)
        try:
            self._catch_up(view, cache, mask)
            cache.before_step(hidden.shape[1])
            with self._adapted(cache, hidden, past):
                out = view(hidden, cache, past, mask, part.position_ids)
        except BaseException:
            cache.rewind(past)
            raise
        cache.after_step(hidden, part.position_ids)
        return out

    def _is_quicker_packed(self, part: StepPart) -> bool:
        """Whether a lone part has several tokens behind others, on a CPU, and heads share keys.

        By itself, all keys would be copied for each head; a packed batch's attention reads them where they
        are.
        """
        several = (part.hidden.shape[1] > 1 or part.cache.is_some_rows) and part.cache.tokens > 0
        return several and self._packs_lone_steps and not part.cache.recurrent

    @torch.inference_mode()
    def _forward_quickly(self, parts: Sequence[StepPart], path: DecodePath) -> list[Tensor] | None:
        """Run checked parts over the same blocks by the quicker way; None if they cannot be."""
        blocks = parts[0].cache.start, parts[0].cache.stop
        view = self.view_of(*blocks)
        if not self.runs_together or not all(is_next_token(part, view) for part in parts):
            return None
        outputs = path.run(blocks, self._packed(blocks), [part.to(self.device, self.dtype) for part in parts])
        if not path.work:
            self.decode_path = None
        return outputs

    def _packed(self, blocks: tuple[int, int]) -> PackedView:
        packed = self._packed_views.get(blocks)
        if packed is None:
            model = self.view_of(*blocks).model
            packed = self._packed_views[blocks] = PackedView(model, self._anatomy, self._adapters)
        return packed

    @torch.inference_mode()
    def _forward_packed(self, parts: Sequence[StepPart]) -> list[Tensor]:
        """Run checked parts over the same blocks at once; if it raises, all caches are as they were."""
        pasts = [part.cache.tokens for part in parts]
        blocks = parts[0].cache.start, parts[0].cache.stop
        view = self.view_of(*blocks)
        packed = self._packed(blocks)
        parts = [part.to(self.device, self.dtype) for part in parts]
        try:
            needed = [
                part.attention_mask is not None or not view.needs_no_mask(part.hidden, past)
                for part, past in zip(parts, pasts, strict=True)
            ]
            for part in parts:
                part.cache.before_step(part.hidden.shape[1])
            outputs = packed(parts, needed)
        except BaseException:
            for part, past in zip(parts, pasts, strict=True):
                part.cache.rewind(past)
            raise
        for part in parts:
            part.cache.after_step(part.hidden, part.position_ids)
        return outputs

    @cached_property
    def weights(self) -> frozenset[int]:
        """Addresses of the storages that weights are in."""
        parts = (*self._base.parameters(), *self._base.buffers())
        return frozenset(part.untyped_storage().data_ptr() for part in parts if part.layout == torch.strided)

    def _fitting(self, adapter: Adapter | None, start: int, stop: int) -> Adapter | None:
        if adapter is None or adapter.spec.is_empty:
            return None
        spec = adapter.spec
        if not spec.start <= start < stop <= spec.stop:
            raise AdapterError(f"the adapter is for blocks {spec.start}:{spec.stop}, not {start}:{stop}")
        self.fittings.check(spec.within(start, stop))
        return adapter

    def _adapted(self, cache: StageCache, hidden: Tensor, past: int) -> AbstractContextManager[None]:
        if cache.adapter is None:
            return nullcontext()
        segment = Segment.of(cache.adapter, hidden, past, cache.prompt_order)
        return self._adapters.applied(cache.start, cache.stop, [segment])

    def check_full_sequences(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> None:
        """Check that blocks `[start, stop)` can be run over full sequences like these.

        Raises:
            UsageError: shapes do not fit each other or the model, or the blocks are not in this stage.
        """
        self._check(hidden, self.new_cache(start, stop), 0, attention_mask, position_ids)

    def run_full_sequences(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        adapter: Tensors | None = None,
    ) -> Tensor:
        """Run blocks `[start, stop)` over full sequences, without a cache, in the caller's gradient mode.

        The arguments are those of `check_full_sequences`, which they have passed, of this stage's dtype and
        device.

        Args: adapter: of these blocks; differentiable too.
        """
        segment = Segment(adapter, hidden.shape[0], hidden.shape[1], 0)
        with self._adapters.applied(start, stop, [segment]):
            return self.view_of(start, stop)(hidden, None, 0, attention_mask, position_ids)

    def _catch_up(self, view: View, cache: StageCache, attention_mask: Tensor | None) -> None:
        """Run the inputs again that recurrent blocks were cut back behind, in chunks."""
        while (missing := cache.missing()) is not None:
            inputs, positions = (part[:, :CATCH_UP_TOKENS] for part in missing)
            held = cache.get_seq_length()
            end = held + inputs.shape[1]
            mask = None if attention_mask is None else attention_mask[:, :end]
            with self._adapted(cache, inputs, held):
                view(inputs, cache, held, mask, positions)
            cache.caught_up(inputs.shape[1])

    def _check(
        self,
        hidden: Tensor,
        cache: StageCache,
        past: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        shape = hidden.shape
        if len(shape) != 3 or shape[2] != self.hidden_size or not shape[0] or not shape[1]:
            raise UsageError(
                f"Hidden states are [batch, tokens, {self.hidden_size}], none of them 0, not {list(shape)}."
            )
        batch, tokens = shape[0], shape[1]
        if cache.start - cache.offset != self.start or cache.stop > self.stop:
            raise UsageError("The cache belongs to another stage; take one from this stage's new_cache().")
        if past and batch != cache.batch:
            raise UsageError(f"The cache has a batch of {cache.batch}, the hidden states of {batch}.")
        if attention_mask is not None and attention_mask.shape != (batch, past + tokens):
            raise UsageError(
                f"The attention mask is [batch, past + tokens] = [{batch}, {past + tokens}], "
                f"not {list(attention_mask.shape)}."
            )
        if position_ids is not None and tuple(position_ids.shape) not in ((batch, tokens), (1, tokens)):
            raise UsageError(
                f"Position ids are [batch, tokens] = [{batch}, {tokens}], not {list(position_ids.shape)}."
            )

    def view_of(self, start: int, stop: int) -> View:
        view = self._views.get((start, stop))
        if view is None:
            first, last = start - self.start, stop - self.start
            blocks: Any = self._base.get_submodule(self._anatomy.layers)
            config = slice_config(self._base.config, first, last)
            model = with_blocks(self._base, self._anatomy.layers, config, list(blocks)[first:last])
            view = self._views[start, stop] = View(model, self._anatomy)
        return view
