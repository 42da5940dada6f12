"""A model cut into stages is the same model: for every architecture, equal logits and equal tokens."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from swarmkit.models.architecture.anatomy import anatomy_of, cache_argument
from swarmkit.models.architecture.quirks import FAMILIES
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import build_head, load_local
from swarmkit.models.plan import block_bytes, cache_cost

from .tiny import (
    ARCHITECTURES,
    PROMISED,
    RECURRENT,
    VOCABULARY,
    StageChain,
    make_checkpoint,
    model_type_of,
    quantise_mxfp4,
)

CUTS = [(0, 1), (1, 4), (4, 5)]
PROMPT_TOKENS, NEW_TOKENS = 9, 8
"""Together they are longer than two sliding windows."""


def some_slowly(name: str) -> object:
    return pytest.param(name, marks=() if name in PROMISED else pytest.mark.slow)


@pytest.fixture(scope="module", params=map(some_slowly, ARCHITECTURES))
def opened(request: pytest.FixtureRequest, checkpoints: Path) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(checkpoints, request.param))


@pytest.fixture(scope="module")
def local(opened: Checkpoint) -> PreTrainedModel:
    return load_local(opened)


@pytest.fixture(scope="module")
def stages(opened: Checkpoint) -> list[Stage]:
    return [Stage.load(opened, start, stop) for start, stop in CUTS]


def prompts(batch: int, padded: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and mask of `[batch, PROMPT_TOKENS]`; if padded, row i begins with 2 * i padding tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (batch, PROMPT_TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch if padded else 0):
        ids[row, : 2 * row] = 0
        mask[row, : 2 * row] = 0
    return ids, mask


def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits of the prompt's real tokens and of each step, and the tokens, without `generate`."""
    cache = DynamicCache(config=model.config)  # only the local model puts anything in it
    logits, tokens = [], []
    step, past = ids, 0
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            if mask is None:
                positions = torch.arange(past, past + step.shape[1])[None]
            else:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
            options = {"position_ids": positions, cache_argument(type(model)): cache}
            out = model(input_ids=step, attention_mask=mask, **options).logits
            real = out if mask is None or past else out * mask[..., None]
            logits.append(real.reshape(real.shape[0], -1))
            past += step.shape[1]
            step = out[:, -1:].argmax(-1)
            tokens.append(step)
            mask = None if mask is None else torch.cat([mask, torch.ones_like(step)], dim=1)
    return torch.cat(logits, dim=1), torch.cat(tokens, dim=1)


_WANTED: WeakKeyDictionary[PreTrainedModel, dict[object, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
"""What local models answered, by the prompt; most of them are asked the same several times."""


def assert_same(model: PreTrainedModel, local: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> None:
    answers = _WANTED.setdefault(local, {})
    key = tuple(ids.flatten().tolist()), mask is None
    if key not in answers:
        answers[key] = greedy(local, ids, mask)
    wanted_logits, wanted_tokens = answers[key]
    logits, tokens = greedy(model, ids, mask)
    torch.testing.assert_close(logits, wanted_logits, atol=1e-5, rtol=1e-5)
    assert tokens.tolist() == wanted_tokens.tolist()


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_three_uneven_stages_equal_the_local_model(
    opened: Checkpoint, local: PreTrainedModel, stages: list[Stage], batch: int
) -> None:
    model = build_head(opened, StageChain(stages))
    ids, _ = prompts(batch)
    assert_same(model, local, ids, None)


def test_a_left_padded_batch_equals_the_local_model(
    opened: Checkpoint, local: PreTrainedModel, stages: list[Stage]
) -> None:
    model = build_head(opened, StageChain(stages))
    assert_same(model, local, *prompts(3, padded=True))


@pytest.mark.slow
@pytest.mark.parametrize("boundary", [1, 2, 3, 4])
def test_a_cut_at_any_boundary_equals_the_local_model(
    opened: Checkpoint, local: PreTrainedModel, boundary: int
) -> None:
    two = [Stage.load(opened, 0, boundary), Stage.load(opened, boundary, 5)]
    assert_same(build_head(opened, StageChain(two)), local, *prompts(3, padded=True))


def test_sessions_may_use_some_blocks_of_a_stage(opened: Checkpoint, local: PreTrainedModel) -> None:
    whole = Stage.load(opened, 0, 5)
    later = Stage.load(opened, 2, 5)
    model = build_head(opened, StageChain([whole, later, whole], [(0, 3), (3, 4), (4, 5)]))
    assert_same(model, local, *prompts(3, padded=True))
    assert whole.new_cache(0, 5).tokens == 0  # a view leaves the stage itself as it was
    assert_same(build_head(opened, StageChain([whole])), local, prompts(1)[0], None)


@pytest.mark.parametrize("keep", [7, *(pytest.param(keep, marks=pytest.mark.slow) for keep in (1, 10, 12))])
def test_a_cropped_and_reordered_cache_equals_a_fresh_one(
    opened: Checkpoint, stages: list[Stage], keep: int
) -> None:
    stage = stages[1]
    hidden = torch.randn(3, 16, stage.hidden_size, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 16)
    mask[1, :3] = 0
    cache = stage.new_cache(1, 4)
    for part in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 12)):
        stage.forward(hidden[:, part], cache, attention_mask=mask[:, : part.stop])
    order = [2, 0, 0, 1]
    cache.edit(keep, order)
    assert (cache.tokens, cache.batch) == (keep, 4)

    fresh = stage.new_cache(1, 4)
    rows, seen = hidden[order], mask[order]
    stage.forward(rows[:, :keep], fresh, attention_mask=seen[:, :keep])
    for part in (slice(keep, keep + 1), slice(keep + 1, keep + 4)):
        out, wanted = (
            stage.forward(rows[:, part], one, attention_mask=seen[:, : part.stop]) for one in (cache, fresh)
        )
        real = seen[:, part, None].bool()
        torch.testing.assert_close(out * real, wanted * real, atol=1e-5, rtol=1e-5)


def test_a_token_takes_the_bytes_that_the_checkpoint_tells(opened: Checkpoint, stages: list[Stage]) -> None:
    stage = stages[1]
    cache = stage.new_cache(2, 4)
    stage.forward(torch.zeros(3, 7, stage.hidden_size), cache)
    if opened.model_type in RECURRENT:
        assert cache.nbytes() > 0
    else:
        assert cache.nbytes() == 3 * 7 * 2 * cache_cost(opened, torch.float32).token_bytes


def test_blocks_weigh_what_the_checkpoint_tells(opened: Checkpoint, stages: list[Stage]) -> None:
    def bytes_of(stage: Stage) -> list[int]:
        blocks = stage.base.get_submodule(anatomy_of(opened.config).layers)
        return [sum(p.nbytes for p in block.parameters()) for block in blocks.children()]

    weights = [size for stage in stages for size in bytes_of(stage)]
    assert block_bytes(opened, torch.float32) == max(weights)
    assert block_bytes(opened, torch.bfloat16) == max(weights) // 2


def test_a_checkpoint_with_quantised_experts_equals_the_local_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt_oss", intermediate_size=32)
    quantise_mxfp4(folder)
    opened = Checkpoint.open(folder)
    stages = [Stage.load(opened, start, stop) for start, stop in CUTS]
    assert_same(build_head(opened, StageChain(stages)), load_local(opened), *prompts(2))
    blocks = stages[0].base.get_submodule("layers")
    assert sum(p.nbytes for p in blocks.parameters()) == block_bytes(opened, torch.float32)


def test_every_supported_architecture_is_tested() -> None:
    assert {model_type_of(name) for name in ARCHITECTURES} == set(FAMILIES)
    assert set(ARCHITECTURES) >= PROMISED
