"""What a model with remote blocks can do about adapters."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from swarmkit.client.adapters.meta_blocks import HeadBlocks, make_meta_blocks
from swarmkit.client.adapters.model_adapters import ModelAdapters, ServerAdapter
from swarmkit.client.adapters.prompt_rows import check_prompts
from swarmkit.client.routing.hosted_adapters import hosted_everywhere, one_of
from swarmkit.client.swarm.connection import Connection
from swarmkit.errors import UsageError
from swarmkit.models.architecture.anatomy import anatomy_of, replace
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.head.head_kind import base_path


class AdapterMixin:
    """The part of a model with remote blocks that lets them be tuned."""

    _swarm: Connection
    _checkpoint: Checkpoint
    _remote_adapters: ModelAdapters

    @property
    def connection(self) -> Connection:
        """The connection to the swarm."""
        return self._swarm

    @property
    def remote_adapters(self) -> ModelAdapters:
        """The adapters of the remote blocks."""
        return self._remote_adapters

    def prepare_adapters(self) -> None:
        """Let the remote blocks' linear layers be found, so that adapters can be put beside them.

        Done when PEFT first looks for modules. The model gets modules for all its blocks, which take no
        memory and no place in its state dict. May be called twice.
        """
        if self._remote_adapters.is_prepared:
            return
        config = self._checkpoint.config
        model: Any = self
        meta_blocks, fittings = make_meta_blocks(config, model.dtype)
        anatomy = anatomy_of(config)
        base: Any = model.get_submodule(base_path(model, anatomy))
        blocks: Any = base.get_submodule(anatomy.layers)
        replace(base, anatomy.layers, HeadBlocks(blocks[0], meta_blocks))
        this = weakref.ref(self)
        self._remote_adapters.prepare(
            meta_blocks, fittings, lambda: getattr(this(), "peft_config", None) or {}
        )

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """torch's; and the call by which PEFT finds the layers that it puts adapters beside."""
        adapters = getattr(self, "_remote_adapters", None)  # None while the model is being made
        if adapters is not None:
            if sys._getframe(1).f_globals.get("__name__", "").startswith("peft."):
                self.prepare_adapters()
            adapters.refuse_merging()
        return super().named_modules(*args, **kwargs)  # type: ignore[misc]

    def use_deep_prompts(self, prompts: nn.Module | None, values: nn.Parameter | None = None) -> None:
        """Have a prompt for each block, or none any more; done by `swarmkit.DeepPrompts(model, …)`.

        Args:
            prompts: becomes a part of the model, in the place of earlier prompts.
            values: its parameter `[blocks, P, hidden]`.
        """
        self.prepare_adapters()
        model: Any = self
        model._modules.pop("deep_prompts", None)
        if prompts is not None:
            model.add_module("deep_prompts", prompts)
        self._remote_adapters.prompts = values

    @contextmanager
    def block_prompts(self, prompts: Tensor) -> Iterator[None]:
        """Within this context each block adds its prompts to the first tokens of its inputs.

        Example::

            with model.block_prompts(hypernetwork(task)):       # [blocks, batch, tokens, hidden]
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()                                     # gradients reach the hypernetwork

        Args:
            prompts: `[blocks, tokens, hidden]`, or `[blocks, batch, tokens, hidden]` with other prompts for
                each row. They may be computed from trained parameters. `generate()` uses those of a row for
                all its beams. Prompts that the model has otherwise (`DeepPrompts`) are not used meanwhile.

        Raises:
            UsageError: they are of another shape.
        """
        reference = self._swarm.client.model
        check_prompts(prompts, reference.num_blocks, reference.hidden_size)
        self.prepare_adapters()
        adapters = self._remote_adapters
        before, adapters.prompts = adapters.prompts, prompts
        try:
            yield
        finally:
            adapters.prompts = before

    def hosted_adapters(self) -> dict[str, str]:
        """Adapters that servers host for everybody: by their hashes, what they are called.

        Those are listed that are hosted for every block.
        """
        client = self._swarm.client
        servers = self._swarm.call(client.known.look)
        return hosted_everywhere(servers, client.model.num_blocks)

    @contextmanager
    def hosted_adapter(self, name: str) -> Iterator[None]:
        """Within this context the model has an adapter that servers host: only those servers are used.

        Args:
            name: what it is called, or (the beginning of) its hash where several are called so.

        Raises:
            UsageError: no server hosts it, or not for all blocks.
        """
        if self._remote_adapters.hosted is not None:
            raise UsageError(f"the hosted adapter {self._remote_adapters.hosted.label} is in use already")
        client = self._swarm.client
        servers = self._swarm.call(client.known.look)
        digest, label = one_of(servers, client.model.num_blocks, name)
        self._remote_adapters.use_hosted(ServerAdapter(label, digest))
        try:
            yield
        finally:
            self._remote_adapters.hosted = None
