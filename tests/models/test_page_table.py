"""Rows that share pages hold what rows with everything of their own would hold, in less memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.models.kv.cache import StageCache
from swarmkit.models.kv.page_table import PAGE_TOKENS, PageTable
from swarmkit.models.kv.paged_rows import PagedLayer

from .tiny import make_checkpoint, tiny_config

PAGE = PAGE_TOKENS
SHAPES = (((2, 3), (2, 5)), ((1, 4), (1, 2)))
"""(heads, dim) of keys and of values, of each block."""
TOKEN_NUMEL = sum(heads * dim for block in SHAPES for heads, dim in block)


# the table


def test_rows_that_are_repeated_take_no_slots() -> None:
    table = PageTable([range(3)], 2 * PAGE + 1)
    table.order([0, 0, 0, 0])
    assert (table.slots, table.spare) == (3, 0)


def test_a_partly_filled_page_that_is_shared_is_copied_for_all_but_one() -> None:
    table = PageTable([range(2)], PAGE + 1)
    table.order([0, 0, 0])
    assert table.reserve(1) == [(1, 2), (1, 3)]
    assert table.rows == [[0, 2], [0, 3], [0, 1]]


def test_a_full_page_that_is_shared_is_not_copied() -> None:
    table = PageTable([range(2)], 2 * PAGE)
    table.order([0, 0])
    assert table.reserve(1) == []
    assert table.rows == [[0, 1, 2], [0, 1, 3]]


def test_a_dropped_row_frees_what_was_its_own() -> None:
    table = PageTable([[0, 1, 2], [0, 3, 4]], 3 * PAGE)
    table.order([0])
    assert (table.slots, table.spare) == (5, 2)


def test_a_rollback_frees_pages() -> None:
    table = PageTable([[0, 1, 2], [0, 3, 4]], 3 * PAGE)
    table.crop(PAGE)
    assert (table.slots, table.spare) == (5, 4)


def test_compacting_moves_the_last_pages_into_the_holes() -> None:
    table = PageTable([[0, 1, 2], [0, 3, 4]], 3 * PAGE)
    table.order([1])
    assert table.compact() == [(3, 1), (4, 2)] or table.compact() == [(3, 2), (4, 1)]
    table.audit()
    assert (table.slots, table.spare) == (3, 0)


def test_an_audit_finds_a_page_without_its_owner() -> None:
    table = PageTable([[0, 1], [0, 2]], 2 * PAGE)
    table.rows[1][0] = 1
    with pytest.raises(AssertionError, match="owners"):
        table.audit()


# what the rows hold


class Rows:
    """A cache that is given noise for keys and values, beside plain tensors that go through the same."""

    def __init__(self, rows: int) -> None:
        config = tiny_config("llama")
        config.num_hidden_layers = len(SHAPES)
        self.cache = StageCache(0, len(SHAPES), config=config)
        self.plain = [[torch.zeros(rows, heads, 0, dim) for heads, dim in block] for block in SHAPES]
        self.generator = torch.Generator().manual_seed(0)

    @property
    def rows(self) -> int:
        return len(self.plain[0][0])

    def append(self, tokens: int, alike: bool = False) -> None:
        leased = self.cache.pages_after(self.cache.tokens, None, self.rows, tokens)
        self.cache.before_step(tokens)
        for index, block in enumerate(self.plain):
            new = [self._noise(part, tokens, alike) for part in block]
            self.plain[index] = [torch.cat(pair, dim=2) for pair in zip(block, new, strict=True)]
            seen = self.cache.layers[index].update(*new)
            assert all(map(torch.equal, seen, self.plain[index]))
        self.cache.after_step(torch.empty(self.rows, tokens, 1), None)
        assert self.cache.pages_held() <= leased

    def fail(self, tokens: int) -> None:
        """A step of which only the first block is run."""
        self.cache.before_step(tokens)
        self.cache.layers[0].update(*[self._noise(part, tokens, False) for part in self.plain[0]])
        self.cache.rewind(self.cache.tokens)

    def edit(self, tokens: int, order: list[int] | None) -> None:
        """The edit of a step, and a step of one token."""
        chosen = list(range(self.rows)) if order is None or not tokens else order
        before, leased = self.cache.pages_held(), self.cache.pages_after(tokens, order, len(chosen), 1)
        self.cache.edit(tokens, order)
        self.plain = [[part[chosen, :, :tokens] for part in block] for block in self.plain]
        assert self.cache.pages_held() <= max(before, leased)
        self.audit()
        self.append(1)
        assert self.cache.pages_held() <= leased

    def audit(self) -> None:
        """The cache holds what it should, in no more memory than it says, and full pages once."""
        layers = self.cache.blocks
        if not self.cache.tokens:
            assert self.cache.nbytes() == self.cache.pages_held() == 0
            return
        for layer, block in zip(layers, self.plain, strict=True):
            assert torch.equal(layer.keys, block[0])
            assert torch.equal(layer.values, block[1])
        limit = self.cache.pages_held() * PAGE * TOKEN_NUMEL * 4
        assert sum(map(memory_of, layers)) <= limit
        if not isinstance(layers[0], PagedLayer):
            return
        table = layers[0].table
        table.audit()
        assert not table.wasteful
        assert self.cache.nbytes() == limit
        full = {slot for row in table.rows for slot in row[: table.tokens // PAGE]}
        assert len(full) == len(self._contents())

    def _contents(self) -> set[bytes]:
        """All different full pages."""
        keys = self.plain[0][0]
        pages = range(keys.shape[2] // PAGE)
        return {row[:, page * PAGE : (page + 1) * PAGE].numpy().tobytes() for row in keys for page in pages}

    def _noise(self, like: Tensor, tokens: int, alike: bool) -> Tensor:
        rows, heads, _, dim = like.shape
        noise = torch.rand(1 if alike else rows, heads, tokens, dim, generator=self.generator)
        return noise.expand(rows, -1, -1, -1)


def memory_of(layer: Any) -> int:
    """Bytes of the storages behind a block's keys and values."""
    parts = layer.pools if isinstance(layer, PagedLayer) else (layer.keys, layer.values)
    return sum(part.untyped_storage().nbytes() for part in parts)


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 70)),
        st.tuples(st.just("fail"), st.integers(1, 70)),
        st.tuples(st.just("choose"), st.integers(0, 2**32)),
        st.tuples(st.just("crop"), st.integers(0, 80)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=100)
@given(st.integers(1, 4), st.booleans(), MOVES)
@torch.inference_mode()
def test_whatever_happens_rows_hold_what_they_were_given(
    rows: int, alike: bool, moves: list[tuple[str, int]]
) -> None:
    session = Rows(rows)
    session.append(2 * PAGE + 3, alike)
    for what, number in moves:
        if what == "append":
            session.append(number)
        elif what == "fail" and session.cache.tokens:
            session.fail(number)
        elif what == "choose":
            chance = random.Random(number)
            session.edit(session.cache.tokens, chance.choices(range(session.rows), k=chance.randint(1, 5)))
        elif what == "crop":
            session.edit(max(0, session.cache.tokens - number), None)
        elif what == "clear":
            session.edit(0, None)
        session.audit()


# of a model


@pytest.fixture(scope="module")
def stage(checkpoints: Path) -> Stage:
    return Stage.load(Checkpoint.open(make_checkpoint(checkpoints, "llama", num_blocks=4)), 0, 4)


def hidden(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(seed))


def test_four_beams_of_a_long_prompt_take_little_more_than_one(stage: Stage) -> None:
    one, beams = stage.new_cache(0, 4), stage.new_cache(0, 4)
    prompt = hidden(1, 512)
    stage.forward(prompt, one)
    stage.forward(prompt.expand(4, -1, -1), beams)
    assert beams.nbytes() == 4 * one.nbytes()
    beams.edit(512, [0, 0, 0, 0])
    stage.forward(hidden(4, 1), beams)
    ends = 4 * one.nbytes() * PAGE // 512
    assert beams.nbytes() == one.nbytes() + ends


def test_beams_that_were_computed_side_by_side_share_their_prompt(stage: Stage) -> None:
    beams = stage.new_cache(0, 4)
    stage.forward(hidden(1, 3 * PAGE).expand(3, -1, -1), beams)
    stage.forward(hidden(3, 1), beams)
    beams.edit(3 * PAGE + 1, [2, 0, 2])
    assert beams.pages_held() == 3 + 2


def test_shared_rows_equal_rows_of_their_own_to_the_last_bit(stage: Stage) -> None:
    shared, rooms = stage.new_cache(0, 4), stage.new_cache(0, 4)
    prompt = hidden(2, 2 * PAGE - 1)
    stage.forward(prompt, shared)
    shared.edit(2 * PAGE - 1, [1, 0, 1])
    stage.forward(prompt[[1, 0, 1]], rooms)
    for seed in range(1, 4):  # over the end of a page
        given = hidden(3, 1, seed)
        assert torch.equal(stage.forward(given, shared), stage.forward(given, rooms))


def test_shared_rows_run_together_with_another_session(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    shared, rooms, other = (stage.new_cache(0, 4) for _ in range(3))
    stage.forward(hidden(1, PAGE + 1), shared)
    stage.forward(hidden(1, PAGE + 1).expand(3, -1, -1), rooms)
    shared.edit(PAGE + 1, [0, 0, 0])
    given = hidden(3, 1, 2)
    out, _ = stage.forward_many([StepPart(given, shared), StepPart(hidden(1, 2), other)])
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out, stage.forward(given, rooms), atol=1e-5, rtol=1e-5)
    assert caplog.records == []  # that they were run one by one
