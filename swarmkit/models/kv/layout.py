"""What the layouts have in common in which a session's keys and values can lie.

- `contiguous`: each row's tokens behind one another, in memory of its own. Every session begins so.
- `paged_rows`: pages that several rows share. Rows of which one was chosen twice (beams) go on so.
- `static_slots`: one row in memory that never moves. Sessions that decode through CUDA graphs go on so.

`StageCache` moves a session from one layout to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

KeysAndValues: TypeAlias = tuple[Tensor, Tensor]


class KVLayout(Protocol):
    """Where one session's keys and values lie, for blocks that all hold the same tokens.

    Attributes:
        layers: the cache layer of each block, as transformers calls it.
    """

    layers: list[Any]

    @property
    def has_pages(self) -> bool:
        """Whether keys and values of full pages can be copied out of the layers, and appended to them."""

    @property
    def pages(self) -> int:
        """Pages (of one row, in all blocks) that memory is held for, also where they are empty."""

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held: of shared pages all that they take, else without what is empty."""

    def reserve(self, tokens: int) -> bool:
        """Have room for `tokens` tokens per row in all, before those behind the held ones are written.

        Returns: False if that is more than this layout can hold.
        """

    def hold(self, rows: int, tokens: int) -> None:
        """Note that all blocks hold `tokens` tokens of each of `rows` rows now."""

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens, whatever the blocks hold behind them; at least one."""

    def select(self, rows: Sequence[int]) -> None:
        """Let row i be what row `rows[i]` was. If it raises, the layers are of no use any more."""

    def into_rooms(self) -> Iterator[KeysAndValues]:
        """Give up all that is held, block by block: [rows, heads, tokens of whole pages, dim]."""

    def shared_pages(self, order: Sequence[int] | None, tokens: int) -> int | None:
        """Pages that the rows hold if `order` of them are chosen and share pages; None: each row has its own.

        Args: tokens: of each row.
        """


class HeldLayer(CacheLayerMixin):
    """A cache layer that is made with all that it holds; `get_seq_length` says how many tokens."""

    def __init__(self, part: Tensor) -> None:
        """Args: part: some of what it holds, for its device."""
        self.device = part.device
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to do."""


def with_room(part: Tensor, tokens: int) -> Tensor:
    """A copy of keys or values [rows, heads, held tokens, dim] with room for `tokens` tokens."""
    room = part.new_empty(*part.shape[:-2], tokens, part.shape[-1])
    room[..., : part.shape[-2], :] = part
    return room
