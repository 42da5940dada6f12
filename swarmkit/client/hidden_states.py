"""`output_hidden_states=True` for a model whose blocks are elsewhere.

transformers collects hidden states where blocks are called. Here one module stands for all of them, so they
are asked for on the wire, and put where transformers would have put them: the input of the first block, the
output of each block, and in the place of the last block's what the final norm makes of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from swarmkit.client.refusals import refuse_attentions
from swarmkit.client.remote_blocks import RemoteBlocks
from swarmkit.errors import UsageError


def record_states(model: PreTrainedModel, blocks: RemoteBlocks) -> None:
    """Let the part of a model that calls the blocks answer `output_hidden_states`."""
    path = next(path for path, part in model.named_modules() if part is blocks)  # [holder.]layers.0
    holder = model.get_submodule(".".join(path.split(".")[:-2]))

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attentions = kwargs.get("output_attentions")
        refuse_attentions(
            getattr(model.config, "output_attentions", False) if attentions is None else attentions
        )
        wanted = kwargs.get("output_hidden_states")
        if wanted is None:
            wanted = getattr(model.config, "output_hidden_states", False)
        # Also after a call that failed half-way.
        blocks.recorder = [] if wanted else None
        return args, {**kwargs, "output_hidden_states": False}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states, blocks.recorder = blocks.recorder, None
        if states is None:
            return output
        if isinstance(output, tuple):
            raise UsageError("output_hidden_states needs return_dict=True here")
        output["hidden_states"] = (*states[:-1], output.last_hidden_state)
        return output

    holder.register_forward_pre_hook(before, with_kwargs=True)
    holder.register_forward_hook(after)
