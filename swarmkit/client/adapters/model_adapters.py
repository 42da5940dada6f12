"""The adapters that change the remote blocks of one model: PEFT's, deep prompts, or one that servers host.

A session, and a pass over full sequences, asks at its beginning which adapter there is
(`ModelAdapters.current`). The values of a client's adapter go to servers as one vector
(`swarmkit/models/adapters/adapter.py`). Their gradients come back as one vector, and reach PEFT's parameters
through autograd, since that vector is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from swarmkit.client.adapters.peft_config import ensure_possible
from swarmkit.client.adapters.prompt_rows import order_of
from swarmkit.errors import AdapterError
from swarmkit.models.adapters.adapter import Adapter, AdapterSpec, Fittings, Lora, extent


@dataclass(eq=False)
class ClientAdapter:
    """An adapter of this client's own, as it is now.

    Attributes:
        values: `[numel]`, on the CPU; part of an autograd graph where parameters are trained.
    """

    spec: AdapterSpec
    values: Tensor
    fittings: Fittings
    _sources: tuple[tuple[Tensor, int], ...] = ()
    """The parameters, and their versions."""
    _layers: tuple[tuple[Any, tuple[str, ...]], ...] = ()
    """The LoRA layers, and the adapters that were active in each."""
    prompts: Tensor | None = None
    """The deep prompts that are among the values."""
    order: tuple[int, ...] | None = None
    """Whose prompts each row of a session has, where rows have their own; None = row i has those of row i."""
    _parts: dict[tuple[int, int], Adapter] = field(default_factory=dict)
    hosted_name = ""

    @property
    def unchanged(self) -> bool:
        """Whether its parameters still have the values that they had, and are in use. Is quick."""
        return all(parameter._version == version for parameter, version in self._sources) and not any(
            layer.disable_adapters or tuple(layer.active_adapters) != active or layer._forward_pre_hooks
            for layer, active in self._layers
        )

    @property
    def trains(self) -> bool:
        """Whether gradients are wanted."""
        return self.values.requires_grad

    def extent(self, start: int, stop: int) -> tuple[int, int]:
        """The first and last index of the values of blocks [start, stop) in `values`."""
        return extent(self._whole.slots, start, stop)

    @cached_property
    def _whole(self) -> Adapter:
        return Adapter(self.spec, self.values.detach(), self.fittings)

    def part(self, start: int, stop: int) -> Adapter | None:
        """The adapter of blocks [start, stop); None if they have none. Is quick, but for its name, a hash."""
        known = self._parts.get((start, stop))
        if known is None:
            known = self._parts[start, stop] = self._whole.within(start, stop)
        if known.spec.is_empty:
            return None
        return known if self.order is None else known.of_rows(self.order)

    @property
    def differs_by_row(self) -> bool:
        """Whether rows of a batch have prompts of their own."""
        return self.spec.prompt_rows > 0

    def begin(self, rows: int) -> bool:
        """Be for a batch of so many rows, from its first token on. Returns whether `order` has changed.

        Raises:
            UsageError: there are prompts for another number of rows, and `rows` is no multiple of it.
        """
        before, self.order = self.order, order_of(self.spec.prompt_rows, rows)
        return before != self.order

    def reorder(self, order: Sequence[int]) -> None:
        """Row i of the session becomes what row order[i] was."""
        if self.spec.prompt_rows:
            self.order = tuple(row if self.order is None else self.order[row] for row in order)

    def for_session(self, other: ClientAdapter | ServerAdapter | None = None) -> ClientAdapter:
        """The same adapter for another session, whose rows are those of `other`, or of this one."""
        rows = self if other is None else other
        return replace(self, order=rows.order)

    def of_rows(self, low: int, high: int) -> ClientAdapter:
        """The adapter of rows [low, high) of a batch of whole sequences, detached from its parameters."""
        if not self.spec.prompt_rows:
            return self
        rows = range(low, high) if self.order is None else self.order[low:high]
        part = self._whole.of_rows(rows)
        return ClientAdapter(part.spec, part.values.requires_grad_(self.trains), self.fittings)

    def add_of_rows(self, total: Tensor, of_rows: Tensor, low: int, high: int) -> None:
        """Add the gradient of the values of `of_rows(low, high)` to that of all values."""
        rows = range(low, high) if self.order is None else self.order[low:high]
        self._whole.add_of_rows(total, of_rows, rows)

    def is_like(self, other: object) -> bool:
        """Whether it changes blocks in the same way."""
        if not isinstance(other, ClientAdapter) or self.spec != other.spec:
            return False
        return torch.equal(self.values.detach(), other.values.detach())


@dataclass(frozen=True)
class ServerAdapter:
    """An adapter that servers host as `hosted_name`; only those servers can be used."""

    label: str
    hosted_name: str
    unchanged = True
    trains = False
    order = None
    differs_by_row = False

    def part(self, start: int, stop: int) -> None:
        """Nothing has to be sent."""

    def begin(self, rows: int) -> bool:
        """It is the same for any rows."""
        return False

    def reorder(self, order: Sequence[int]) -> None:
        """It is the same for any rows."""

    def for_session(self, other: object = None) -> ServerAdapter:
        """It is the same for any session."""
        return self

    def of_rows(self, low: int, high: int) -> ServerAdapter:
        """It is the same for any rows."""
        return self

    def is_like(self, other: object) -> bool:
        return isinstance(other, ServerAdapter) and other.hosted_name == self.hosted_name


class ModelAdapters:
    """The adapters of a model's remote blocks: its own on the meta blocks, and the hosted one."""

    def __init__(self) -> None:
        self._meta_blocks: Mapping[int, nn.Module] = {}
        self._fittings: Fittings | None = None
        self._peft_configs: Callable[[], Mapping[str, Any]] = dict
        self._slots: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        """Where the meta_blocks keep each module that PEFT may replace, and which one was there at first."""
        self._own: set[int] = set()
        """The ids of the meta blocks' own parameters."""
        self.prompts: Tensor | None = None
        """`[blocks, P, hidden]`, or `[blocks, rows, P, hidden]` where each row of a batch has its own."""
        self.hosted: ServerAdapter | None = None
        self.may_exist = False
        """Whether there is an adapter, or may have been one; most models never have any."""

    @property
    def is_prepared(self) -> bool:
        """Whether there are meta blocks."""
        return self._fittings is not None

    def use_hosted(self, adapter: ServerAdapter) -> None:
        """Have an adapter that servers host, until `hosted` is None again."""
        self.may_exist = True
        self.hosted = adapter

    def prepare(
        self,
        meta_blocks: Mapping[int, nn.Module],
        fittings: Fittings,
        peft_configs: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Look for adapters on these meta blocks from now on.

        Args: peft_configs: returns the configs of PEFT's adapters that the model has now, by their names.
        """
        self.may_exist = True
        self._meta_blocks, self._fittings, self._peft_configs = meta_blocks, fittings, peft_configs
        self._own = {id(parameter) for block in meta_blocks.values() for parameter in block.parameters()}
        self._slots = [
            (parent._modules, name, child)
            for block in meta_blocks.values()
            for parent in block.modules()
            for name, child in parent.named_children()
        ]

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was put on the meta_blocks, and there are no deep prompts. Is quick."""
        if self._fittings is None:
            return True
        return self.prompts is None and all(held.get(name) is first for held, name, first in self._slots)

    def refuse_merging(self) -> None:
        """Let PEFT's layers on the meta_blocks refuse to be merged into weights that are not here."""
        for meta_block in self._meta_blocks.values():
            for layer in meta_block.modules():
                if hasattr(layer, "merged_adapters"):
                    layer.merge = _refuse_to_merge  # type: ignore[assignment]

    def is_unchanged_since(self, last: ClientAdapter | ServerAdapter | None) -> bool:
        """Whether `current()` would return what it did before; quick, since every step asks."""
        if self.hosted is not None or last is None:
            return last == self.hosted and self.is_untouched
        return isinstance(last, ClientAdapter) and last.prompts is self.prompts and last.unchanged

    def current(
        self, prompts: Tensor | None = None, blocks: tuple[int, int] | None = None
    ) -> ClientAdapter | ServerAdapter | None:
        """The adapter of the blocks now; None if there is none.

        Args:
            prompts: deep prompts in the place of the model's own, for `blocks` only.

        Raises:
            AdapterError: something is on the meta_blocks that cannot work in remote blocks.
        """
        own = self._collect(self.prompts if prompts is None else prompts, blocks)
        if self.hosted is None:
            return own
        if own is not None:
            raise AdapterError(
                f"the hosted adapter {self.hosted.label} and an adapter of your own cannot be used together; "
                "use `with model.disable_adapter():` around it, or take yours away"
            )
        return self.hosted

    def _collect(self, prompts: Tensor | None, blocks: tuple[int, int] | None) -> ClientAdapter | None:
        if self._fittings is None:
            return None
        start, stop = blocks or (0, len(self._meta_blocks))
        for config in self._peft_configs().values():
            ensure_possible(config)
        layers: list[tuple[Any, tuple[str, ...]]] = []
        lora: list[Lora] = []
        parameters: list[Tensor] = []
        for block, meta_block in self._meta_blocks.items():
            if not start <= block < stop:
                continue
            here = sorted(self._lora_of(block, meta_block, layers), key=lambda found: found[0].module)
            for one, a, b in here:
                lora.append(one)
                parameters += [a, b]
            if prompts is not None:
                parameters.append(prompts[block - start])
        if not parameters:
            return None
        tokens = 0 if prompts is None else prompts.shape[-2]
        rows = 0 if prompts is None or prompts.ndim == 3 else prompts.shape[1]
        spec = AdapterSpec(start, stop, tuple(lora), tokens, rows)
        self._fittings.check(spec)
        values = _flat(parameters)
        if not bool(torch.isfinite(values.detach()).all()):
            raise AdapterError(
                "the adapter contains NaN or infinity, so nothing was sent to the swarm; load the last good "
                "one, and lower the learning rate"
            )
        sources = [p for p in parameters if p._base is None]
        if prompts is not None:
            sources.append(prompts)
        versions = tuple((parameter, parameter._version) for parameter in sources)
        return ClientAdapter(spec, values, self._fittings, versions, tuple(layers), prompts)

    def _lora_of(
        self, block: int, meta_block: nn.Module, layers: list[tuple[Any, tuple[str, ...]]]
    ) -> list[tuple[Lora, Tensor, Tensor]]:
        """LoRA layers of one block that are in use; everything else that was put there is refused."""
        found: list[tuple[Lora, Tensor, Tensor]] = []
        known: set[int] = set()
        for name, layer in meta_block.named_modules():
            if not (hasattr(layer, "lora_A") and hasattr(layer, "scaling")):
                continue
            for parts in (layer.lora_A, layer.lora_B):
                known |= {id(part.weight) for part in parts.values()}
            active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
            if layer.disable_adapters or not active:
                continue
            if layer._forward_pre_hooks:  # which is how PEFT hands `adapter_names` to its layers
                raise AdapterError(
                    "adapter_names=[…], another adapter for each row, does not work with remote blocks: "
                    "their sessions have one adapter. Call the model once for each adapter, which "
                    "model.set_adapter(…) chooses; servers run such calls together"
                )
            layers.append((layer, tuple(layer.active_adapters)))
            if len(active) > 1:
                raise AdapterError(
                    f"{len(active)} adapters are active at once ({', '.join(active)}); remote blocks take "
                    "one: choose it with model.set_adapter(…)"
                )
            one = active[0]
            if layer.merged_adapters:
                raise AdapterError("an adapter cannot be merged into remote blocks; unmerge it")
            if getattr(layer, "lora_variant", {}).get(one) is not None:
                raise AdapterError(
                    f"{name} of block {block} is no plain LoRA (DoRA, perhaps); use plain LoRA"
                )
            dropout: Any = layer.lora_dropout[one]
            if layer.training and getattr(dropout, "p", 0) > 0 and torch.is_grad_enabled():
                raise AdapterError(
                    f"lora_dropout={dropout.p} cannot act inside remote blocks while training; "
                    "make the adapter with lora_dropout=0"
                )
            a, b = layer.lora_A[one].weight, layer.lora_B[one].weight
            found.append((Lora(block, name, a.shape[0], float(layer.scaling[one])), a, b))
        for name, parameter in meta_block.named_parameters():
            if id(parameter) in self._own:
                if parameter.requires_grad:
                    raise AdapterError(
                        f"{name} of block {block} is to be trained, but its weights are the servers'; train "
                        "an adapter instead (bias='none', no full fine-tuning of blocks)"
                    )
            elif id(parameter) not in known:
                raise AdapterError(
                    f"{name} in block {block} is not plain LoRA of a linear layer, and cannot work in remote "
                    "blocks"
                )
        return found


@dataclass(frozen=True)
class PromptedAdapters:
    """A model's adapters with deep prompts of one call, or of one session, over blocks [start, stop).

    Attributes:
        prompts: `[blocks, P, hidden]`, or `[blocks, rows, P, hidden]` where each row of a batch has its own.
    """

    adapters: ModelAdapters
    prompts: Tensor
    blocks: tuple[int, int]
    may_exist = True

    def is_unchanged_since(self, last: ClientAdapter | ServerAdapter | None) -> bool:
        """Whether `current()` would return what it did before."""
        return isinstance(last, ClientAdapter) and last.prompts is self.prompts and last.unchanged

    def current(self) -> ClientAdapter | ServerAdapter | None:
        """The adapter of the blocks now; see `ModelAdapters.current`."""
        return self.adapters.current(self.prompts, self.blocks)


def _refuse_to_merge(*args: Any, **kwargs: Any) -> None:
    raise AdapterError(
        "an adapter cannot be merged into remote blocks, whose weights are the servers'; save the adapter, "
        "and merge it into a whole model with plain PEFT"
    )


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters' values in one vector on the CPU, differentiable."""
    dtype = parameters[0].dtype
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return torch.cat([parameter.reshape(-1).to("cpu", dtype) for parameter in parameters])
