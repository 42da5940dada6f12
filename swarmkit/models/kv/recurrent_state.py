"""What a block with linear attention or a convolution keeps of a session besides tokens.

Such a state has a size of its own, however long the session is. A `StageCache` keeps it several times: as it
is, and as it was at some earlier tokens, to be able to go back to these.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from swarmkit.models.architecture.anatomy import anatomy_of, block_configs
from swarmkit.models.kv.cache import MARKS, StageCache

logger = logging.getLogger(__name__)

POSITION_BYTES = 8
"""Of one token, beside its inputs, which a stage with such blocks keeps too."""


class _StateSeen(Exception):
    """The block has shown its states."""


class _StateProbe(StageCache):
    """Stops a block when it has shown its recurrent state, which follows that of its convolution."""

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        super().update_recurrent_state(*args, **kwargs)
        raise _StateSeen


def state_bytes_per_row(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that a session of one row takes in a block (the largest, if they differ) before its first token.

    Seen, not calculated: one token is run through a block of each kind, without memory. 0 where there are
    only keys and values.
    """
    anatomy = anatomy_of(config)
    largest = 0
    for cut in block_configs(config):
        with torch.device("meta"):
            probe = _StateProbe(0, 1, config=cut)
            if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in probe.blocks):
                continue
            base: Any = anatomy.base_class(cut)
            base.to(dtype)
            anatomy.neutralise(base)
            given = torch.empty(1, 1, config.hidden_size, dtype=dtype)
            try:
                with torch.no_grad():
                    base(inputs_embeds=given, use_cache=True, **{anatomy.cache_argument: probe})
            except Exception as error:  # noqa: BLE001 - of what follows the states, much needs real numbers
                logger.debug("a block of %r has shown its states: %s", config.model_type, error)
        largest = max(largest, sum(_state_bytes(layer) for layer in probe.blocks))
    return largest * (1 + MARKS)


def _state_bytes(layer: Any) -> int:
    states = [value for value in vars(layer).values() if isinstance(value, dict)]
    return sum(state.nbytes for kind in states for state in kind.values() if isinstance(state, Tensor))
