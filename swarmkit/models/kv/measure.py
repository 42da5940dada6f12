"""What a block keeps of a session, found out by running it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from swarmkit.errors import ModelError
from swarmkit.models.architecture.anatomy import anatomy_of, block_configs
from swarmkit.models.kv.cache import StageCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockCacheSize:
    """What a session takes in one block (the largest, if blocks differ).

    Attributes:
        values_per_token: keys and values of one token of one row, as a number of values.
        state_bytes_per_row: bytes of the state of linear attention or a convolution, however many tokens a
            row has; 0 in a block that has keys and values only.
    """

    values_per_token: int
    state_bytes_per_row: int


class _Seen(Exception):
    """The block has shown all that it caches."""


class _Probe(StageCache):
    """A cache that stops a block as soon as it has shown what it caches."""

    values_per_token = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.values_per_token = key_states.numel() + value_states.numel()
        if not self.recurrent:
            raise _Seen
        return super().update(key_states, value_states, *args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        state = super().update_recurrent_state(*args, **kwargs)
        if not self.has_keys:  # the state of a block's convolution precedes this one
            raise _Seen
        return state

    @property
    def state_bytes(self) -> int:
        kinds = [kind for layer in self.blocks for kind in vars(layer).values() if isinstance(kind, dict)]
        return sum(state.nbytes for kind in kinds for state in kind.values() if isinstance(state, Tensor))


def measure_block_cache(config: PreTrainedConfig, dtype: torch.dtype) -> BlockCacheSize:
    """Run one token through a block of each kind, without memory, until the block has shown what it caches.

    So no formula is needed for what latent attention caches, or many heads that share their keys.

    Args:
        dtype: of the blocks.

    Raises:
        ModelError: the architecture is not supported, or does not run like this.
    """
    anatomy = anatomy_of(config)
    values, state_bytes = 0, 0
    for cut in block_configs(config):
        with torch.device("meta"), torch.no_grad():
            base: Any = anatomy.base_class(cut)
            base.to(dtype)
            anatomy.neutralise(base)
            probe = _Probe(0, 1, config=cut)
            given = torch.empty(1, 1, config.hidden_size, dtype=dtype)
            try:
                base(inputs_embeds=given, use_cache=True, **{anatomy.cache_argument: probe})
            except _Seen:
                pass
            except Exception as error:
                if not probe.values_per_token and not probe.state_bytes:
                    raise ModelError(
                        f"what a token takes in the cache of a {config.model_type!r} model is unknown "
                        f"({type(error).__name__}: {error}); choose a model that docs/models.md lists"
                    ) from error
                # Much of what follows a state needs real numbers.
                logger.debug("a block of %r has shown what it caches: %s", config.model_type, error)
        values = max(values, probe.values_per_token)
        state_bytes = max(state_bytes, probe.state_bytes)
    return BlockCacheSize(values, state_bytes)
