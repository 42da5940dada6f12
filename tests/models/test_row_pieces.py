"""A step over some rows at a time is the step over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage, StageCache, StepPart

from .tiny import make_checkpoint

PAST = 40
ROWS = 5
PIECES = [(0, 2), (2, 3), (3, 5)]
HIDDEN = 32


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("tiny"), request.param))
    return Stage.load(checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32)


def noise(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def rows_of_their_own(stage: Stage) -> StageCache:
    cache = stage.new_cache(stage.start, stage.stop)
    stage.forward(noise(ROWS, PAST), cache)
    return cache


def rows_that_share_pages(stage: Stage) -> StageCache:
    cache = stage.new_cache(stage.start, stage.stop)
    stage.forward(noise(1, PAST), cache)
    cache.edit(PAST, [0] * ROWS)
    stage.forward(noise(ROWS, 1, 1), cache)
    return cache


LAYOUTS = [rows_of_their_own, rows_that_share_pages]


def in_pieces(
    stage: Stage,
    cache: StageCache,
    hidden: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    pieces: Sequence[tuple[int, int]] = PIECES,
) -> Tensor:
    cache.begin_rows(hidden.shape[1])
    outputs = []
    for first, last in pieces:
        part = StepPart(
            hidden[first:last],
            cache.rows(first, last),
            None if mask is None else mask[first:last],
            None if positions is None else positions[first:last],
        )
        (output,) = stage.forward_many([part])
        assert isinstance(output, Tensor), output
        outputs.append(output)
    cache.end_rows(hidden.shape[1])
    return torch.cat(outputs)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_a_step_in_pieces_yields_what_the_whole_step_does(stage: Stage, make: object, tokens: int) -> None:
    whole, cut = make(stage), make(stage)  # type: ignore[operator]
    hidden, after = noise(ROWS, tokens, 2), noise(ROWS, 1, 3)
    assert same(in_pieces(stage, cut, hidden), stage.forward(hidden, whole))
    assert (cut.tokens, cut.batch, cut.pages_held()) == (whole.tokens, whole.batch, whole.pages_held())
    assert same(stage.forward(after, cut), stage.forward(after, whole))


@pytest.mark.parametrize("make", LAYOUTS)
def test_each_piece_has_the_mask_and_positions_of_its_rows(stage: Stage, make: object) -> None:
    whole, cut = make(stage), make(stage)  # type: ignore[operator]
    hidden = noise(ROWS, 2, 2)
    mask = torch.ones(ROWS, whole.tokens + 2, dtype=torch.bool)
    mask[1, :7] = mask[4, :3] = False
    positions = torch.arange(2).repeat(ROWS, 1) + torch.tensor([[30], [23], [30], [31], [27]])
    wanted = stage.forward(hidden, whole, attention_mask=mask, position_ids=positions)
    assert same(in_pieces(stage, cut, hidden, mask, positions), wanted)


@pytest.mark.parametrize("make", LAYOUTS)
def test_a_step_that_ends_amid_its_pieces_leaves_the_session_as_it_was(stage: Stage, make: object) -> None:
    whole, cut = make(stage), make(stage)  # type: ignore[operator]
    held = cut.tokens
    cut.begin_rows(3)
    stage.forward_many([StepPart(noise(2, 3, 9), cut.rows(0, 2))])
    cut.rewind(held)
    after = noise(ROWS, 1, 3)
    assert same(stage.forward(after, cut), stage.forward(after, whole))


def test_the_first_tokens_of_a_session_are_not_cut_by_rows(stage: Stage) -> None:
    assert not stage.new_cache(stage.start, stage.stop).cuts_rows
