"""The module that stands in a Hugging Face model where its decoder layers were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from swarmkit.client.adapters.peft_config import NO_PREFIXES
from swarmkit.client.gradients.function import FullPass, RemotePass, side_of
from swarmkit.client.refusals import refuse_attentions
from swarmkit.client.session.session import Session, SwarmCacheLayer, session_of
from swarmkit.errors import UsageError

MOST_ROW_TOKENS = 2048
"""A longer sequence goes as a session even where no cache is wanted: micro-batches are made of whole rows."""


class RemoteBlocks(nn.Module):
    """All blocks of a model, run by a swarm. Has no parameters."""

    def __init__(
        self, remote: RemotePass, open_session: Callable[[], Session], attention_type: str = "full_attention"
    ) -> None:
        super().__init__()
        self._remote = remote
        self._open_session = open_session
        self.attention_type = attention_type
        self.recorder: list[torch.Tensor] | None = None
        """Gets the input of the first block and the output of each block, if hidden states are asked for."""

    @torch.compiler.disable  # torch.compile(model) compiles what is local, and calls this as it is
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Send hidden states `[batch, tokens, hidden]` through the swarm.

        Full sequences without a cache go through in micro-batches, and gradients come back; tokens that
        follow a cache are a step of a session.

        Args:
            attention_mask: the padding mask `[batch, past + tokens]`, not the 4-D one.
            past_key_values: a `SwarmCache`; an empty cache of transformers' own, which is turned into one
                unless gradients are wanted; or None.
        """
        session = session_of(past_key_values)
        trains = torch.is_grad_enabled() and (hidden_states.requires_grad or self._remote.trains)
        if session is not None and (trains or self.recorder is not None):
            what = "gradients do" if trains else "hidden states of every block do"
            raise UsageError(
                f"{what} not come out of a session, which keeps its cache on the servers; "
                "call the model without past_key_values, and generate() with use_cache=False"
            )
        if session is not None:
            return session.step(hidden_states, attention_mask, position_ids)
        if trains or self.recorder is not None:
            if past_key_values is not None and past_key_values.get_seq_length() != 0:
                raise _not_ours()
            return self._full_sequences(hidden_states, attention_mask, position_ids)
        if past_key_values is not None:
            session = self._open_session()
            _adopt(past_key_values, session)
            return session.step(hidden_states, attention_mask, position_ids)
        if hidden_states.shape[1] <= MOST_ROW_TOKENS:
            return self._full_sequences(hidden_states, attention_mask, position_ids)
        session = self._open_session()  # which sends long sequences in pieces
        try:
            return session.step(hidden_states, attention_mask, position_ids)
        finally:
            session.close()

    def _full_sequences(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        blocks = self._remote.connection.client.model.num_blocks
        record = self.recorder
        side = side_of(hidden, mask, positions)
        output = self._remote(hidden, FullPass(0, blocks, side, states=record is not None))
        if record is None:
            return output
        states = output.unbind(0)
        record.extend((hidden, *states))
        return states[-1]


def record_states(model: PreTrainedModel, blocks: RemoteBlocks) -> None:
    """Let the part of a model that calls the blocks answer `output_hidden_states`.

    transformers collects hidden states where blocks are called. Here one module stands for all of them, so
    the states are asked for on the wire, and put where transformers would have put them: the input of the
    first block, the output of each block, and for the last block the output of the final norm.
    """
    path = next(path for path, part in model.named_modules() if part is blocks)  # [holder.]layers.0
    holder = model.get_submodule(".".join(path.split(".")[:-2]))

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attentions = kwargs.get("output_attentions")
        if attentions is None:
            attentions = getattr(model.config, "output_attentions", False)
        if attentions:
            refuse_attentions(attentions)
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


def _not_ours() -> UsageError:
    return UsageError(
        "this cache holds keys and values that were not computed by the servers; use model.session(), or no "
        f"past_key_values. If PEFT made it: {NO_PREFIXES}"
    )


def _adopt(cache: Cache, session: Session) -> None:
    """Let a cache that transformers made, and that is still empty, stand for a session.

    This is how `generate()` and `model(…, use_cache=True)` work as they are: both make a `DynamicCache` and
    hand it on from call to call.
    """
    if cache.get_seq_length() != 0:
        raise _not_ours()
    cache.layers = [SwarmCacheLayer(session)]
