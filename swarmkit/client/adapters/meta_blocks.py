"""What PEFT sees of blocks that are elsewhere: the architecture's own, with weights that take no memory.

PEFT puts an adapter beside each linear layer that it finds by its name. So the model is given its blocks
back, under their usual names and with layers of the usual shapes, whose weights are views of a single zero.
They are never called; the numbers that PEFT puts beside them are ordinary parameters on this machine.

::

    model.layers      what the base model runs: [RemoteBlocks], one module for all blocks
        .0 .1 .2 …    what PEFT (and other code that looks for modules) finds: meta_blocks
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from swarmkit.models.adapters.adapter import Fittings
from swarmkit.models.architecture.anatomy import anatomy_of, skeleton_of, stage_config


class HeadBlocks(nn.ModuleList):
    """A list that holds the meta_blocks as modules, and yields the one that does their work."""

    def __init__(self, remote: nn.Module, meta_blocks: dict[int, nn.Module]) -> None:
        super().__init__()
        self._remote = (remote,)  # in a tuple, lest it be a module of the list
        for number, shadow in meta_blocks.items():
            self.add_module(str(number), shadow)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._remote)

    def __getitem__(self, index: Any) -> Any:
        return self._remote[index]

    @property
    def meta_blocks(self) -> dict[int, nn.Module]:
        return {int(name): module for name, module in self._modules.items() if module is not None}


def make_meta_blocks(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[dict[int, nn.Module], Fittings]:
    """Shadows of all blocks of a model, by number, and what adapters may attach to."""
    anatomy = anatomy_of(config)
    skeleton = skeleton_of(anatomy.base_class, stage_config(config, 0, config.num_hidden_layers))
    blocks: Any = skeleton.get_submodule(anatomy.layers)
    meta_blocks: dict[int, nn.Module] = dict(enumerate(blocks))
    fittings = Fittings.of(meta_blocks, config.hidden_size)
    for block in meta_blocks.values():
        for module in block.modules():
            _empty(module, dtype)
        block.eval()
    return meta_blocks, fittings


def _empty(module: Any, dtype: torch.dtype) -> None:
    """Let a module's own parameters and buffers take no memory, and never be saved, loaded or moved."""
    if not module._parameters and not module._buffers:
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            zero = torch.zeros((), dtype=dtype if parameter.is_floating_point() else parameter.dtype)
            module._parameters[name] = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    # To move or cast a view makes a whole tensor of it.
    module._apply = _nothing
    module._save_to_state_dict = module._load_from_state_dict = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is done with a shadow's weights."""
