"""The memory behind keys and values: it grows by pages, and what was cut off is never seen again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage, StageCache
from swarmkit.models.kv.cache import PAGE_TOKENS
from swarmkit.models.plan import cache_cost

from .tiny import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Path) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(checkpoints, "llama", num_blocks=4))


@pytest.fixture(scope="module")
def stage(checkpoint: Checkpoint) -> Stage:
    return Stage.load(checkpoint, 1, 4)


def hidden(rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(tokens))


def memory_of(cache: StageCache) -> int:
    """Bytes that keys and values really take, with the room behind them."""
    tensors = [part for layer in cache.blocks for part in (layer.keys, layer.values) if part is not None]
    return sum(part.untyped_storage().nbytes() for part in tensors)


@pytest.mark.parametrize("tokens", [1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1])
def test_a_session_takes_no_more_memory_than_its_pages(
    stage: Stage, checkpoint: Checkpoint, tokens: int
) -> None:
    cache = stage.new_cache(1, 4)
    stage.forward(hidden(2, tokens), cache)
    for _ in range(2 * PAGE_TOKENS):
        stage.forward(hidden(2, 1), cache)
        pages = -(-cache.tokens // PAGE_TOKENS)
        assert (
            memory_of(cache) <= 2 * pages * PAGE_TOKENS * 3 * cache_cost(checkpoint, stage.dtype).token_bytes
        )


def test_a_step_within_a_page_copies_nothing_of_the_past(stage: Stage) -> None:
    cache = stage.new_cache(1, 4)
    for tokens in (5, 1):
        stage.forward(hidden(1, tokens), cache)
    before = cache.layers[0].keys.data_ptr()
    stage.forward(hidden(1, 1), cache)
    assert cache.layers[0].keys.data_ptr() == before


def test_a_session_that_goes_far_back_gives_its_memory_back(stage: Stage) -> None:
    cache = stage.new_cache(1, 4)
    for tokens in (5 * PAGE_TOKENS, 1):
        stage.forward(hidden(1, tokens), cache)
    long = memory_of(cache)
    cache.edit(3)
    stage.forward(hidden(1, 1), cache)
    assert memory_of(cache) <= long / 5


@pytest.mark.parametrize("order", [None, [1, 0], [0, 0], [1], [0, 1, 0]])
@pytest.mark.parametrize("keep", [3, 7, 8])
def test_what_was_cut_off_is_not_seen_again(stage: Stage, keep: int, order: list[int] | None) -> None:
    rows = order or [0, 1]
    cache = stage.new_cache(1, 4)
    for tokens in (6, 1, 1):
        stage.forward(hidden(2, tokens), cache)
    cache.edit(keep, order)
    fresh = stage.new_cache(1, 4)
    whole = torch.cat([hidden(2, 6), hidden(2, 1), hidden(2, 1)], dim=1)[rows, :keep]
    stage.forward(whole, fresh)
    for tokens in (1, 2, 1):
        given = hidden(2, tokens)[rows]
        torch.testing.assert_close(stage.forward(given, cache), stage.forward(given, fresh))


def test_rows_chosen_twice_go_their_own_ways(stage: Stage) -> None:
    cache = stage.new_cache(1, 4)
    for tokens in (4, 1):
        stage.forward(hidden(2, tokens), cache)
    cache.edit(5, [1, 1])
    stage.forward(hidden(2, 1), cache)
    one, two = cache.layers[0].keys
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.equal(one[:, 5], two[:, 5])
