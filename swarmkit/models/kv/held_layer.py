"""What cache layers of ours have in common that are made with all that a session holds."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

KeysAndValues = tuple[Tensor, Tensor]


class HeldLayer(CacheLayerMixin):
    """A layer that is there from the beginning; `get_seq_length` says how many tokens it holds."""

    def __init__(self, part: Tensor) -> None:
        """Args: part: some of what it holds, for its device."""
        self.device = part.device
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to do."""
