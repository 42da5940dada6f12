"""The module that stands in a Hugging Face model where its decoder layers were."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache

from swarmkit.client.session import Session, SwarmCacheLayer, session_of
from swarmkit.errors import UsageError


class RemoteBlocks(nn.Module):
    """All blocks of a model, run by a swarm. Has no parameters."""

    def __init__(self, open_session: Callable[[], Session], attention_type: str = "full_attention") -> None:
        super().__init__()
        self._open_session = open_session
        self.attention_type = attention_type

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Send hidden states [batch, tokens, hidden] through the swarm.

        Args:
            attention_mask: the padding mask [batch, past + tokens], not the 4-D one.
            past_key_values: a `SwarmCache`; an empty cache of transformers' own, which is turned into one; or
                None, for a session that ends with this call.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise UsageError(
                "gradients cannot flow through remote blocks in this version; "
                "call the model under torch.no_grad(), or freeze what comes before the blocks"
            )
        session = session_of(past_key_values)
        if session is not None:
            return session.step(hidden_states, attention_mask, position_ids)
        session = self._open_session()
        if past_key_values is None:
            try:
                return session.step(hidden_states, attention_mask, position_ids)
            finally:
                session.close()
        _adopt(past_key_values, session)
        return session.step(hidden_states, attention_mask, position_ids)


def _adopt(cache: Cache, session: Session) -> None:
    """Let a cache that transformers made, and that is still empty, stand for a session.

    This is how `generate()` and `model(…, use_cache=True)` work as they are: both make a `DynamicCache` and
    hand it on from call to call.
    """
    if cache.get_seq_length() != 0:
        raise UsageError(
            "this cache holds keys and values of a local model; use model.session(), or no past_key_values"
        )
    cache.layers = [SwarmCacheLayer(session)]
