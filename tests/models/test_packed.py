"""Steps of several sessions run in one pass are the steps that each session would have run alone.

Not to the last bit: a matrix product of more rows may add up in another order. The bound is 1e-5 of the
largest output, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmkit.errors import UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.packed import PackedView
from swarmkit.models.execution.stage import Stage, StageCache, StepPart

from .tiny import ARCHITECTURES, make_checkpoint, model_type_of
from .together import ONE_BY_ONE, Session, assert_equal, hidden, some_slowly, together


@dataclass
class Opened:
    """Three blocks in the middle of a model, and what it is called."""

    name: str
    stage: Stage


@pytest.fixture(scope="module", params=map(some_slowly, ARCHITECTURES))
def opened(request: pytest.FixtureRequest, checkpoints: Path) -> Opened:
    checkpoint = Checkpoint.open(make_checkpoint(checkpoints, request.param))
    return Opened(request.param, Stage.load(checkpoint, 1, 4))


@pytest.fixture(scope="module")
def llama(checkpoints: Path) -> Stage:
    return Stage.load(Checkpoint.open(make_checkpoint(checkpoints, "llama")), 1, 4)


def test_steps_together_are_the_steps_alone(opened: Opened) -> None:
    stage = opened.stage
    plain, late = Session(stage, seed=1), Session(stage, seed=20)
    padded, beams = Session(stage, rows=2, padding=3, seed=40), Session(stage, rows=3, seed=60)
    everyone = [plain, late, padded, beams]
    together(everyone, [9, 1, 5, 3])  # prompts of several lengths
    together(everyone, [1, 1, 1, 1])
    together(everyone, [1, 8, 3, 2])  # decoding beside chunks of prompts
    plain.edit(6)
    padded.edit(7)
    beams.edit(4, [2, 0, 0])
    together(everyone, [1, 1, 1, 1])
    together(everyone, [3, 1, 1, 1])


def test_what_can_be_packed_runs_in_one_pass(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    run = PackedView.__call__

    def count(view: PackedView, parts: list[StepPart], masks: list[bool]) -> list[Tensor]:
        passes.append(len(parts))
        return run(view, parts, masks)

    monkeypatch.setattr(PackedView, "__call__", count)
    together([Session(opened.stage, seed=seed) for seed in (1, 20, 40)], [4, 1, 2])
    assert passes == ([] if model_type_of(opened.name) in ONE_BY_ONE else [3])


def test_one_step_is_just_that_step(llama: Stage) -> None:
    part, wanted = Session(llama).step(5)
    (result,) = llama.forward_many([part])
    assert isinstance(result, Tensor)
    assert torch.equal(result, wanted)


def test_nothing_to_run_is_no_trouble(llama: Stage) -> None:
    assert llama.forward_many([]) == []


def test_bfloat16_differs_by_its_rounding_only(checkpoints: Path) -> None:
    stage = Stage.load(Checkpoint.open(make_checkpoint(checkpoints, "llama")), 1, 4, dtype="bfloat16")
    sessions = [Session(stage, seed=seed) for seed in (1, 20, 40)]
    for tokens in ([7, 2, 1], [1, 1, 1], [1, 5, 1]):
        steps = [session.step(count) for session, count in zip(sessions, tokens, strict=True)]
        for result, (_, wanted) in zip(stage.forward_many([part for part, _ in steps]), steps, strict=True):
            assert isinstance(result, Tensor)
            assert result.dtype == torch.bfloat16
            assert (result - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_sessions_over_other_blocks_of_the_stage(llama: Stage) -> None:
    ranges = [(1, 4), (2, 3), (2, 4), (2, 3), (1, 4)]
    given = [hidden(1, 3, seed) for seed in range(5)]
    caches = [llama.new_cache(*blocks) for blocks in ranges]
    parts = [StepPart(one, cache) for one, cache in zip(given, caches, strict=True)]
    wanted = [llama.forward(one, llama.new_cache(*ends)) for one, ends in zip(given, ranges, strict=True)]
    assert_equal(llama.forward_many(parts), parts, wanted)


def test_a_rotary_embedding_that_follows_the_longest_is_not_shared(checkpoints: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 8,
        "factor": 16.0,
    }
    # A folder of its own: its name tells only the model type.
    folder = make_checkpoint(checkpoints / "longrope", "phi3", rope_parameters=rope)
    stage = Stage.load(Checkpoint.open(folder), 1, 4)
    short, long = Session(stage, seed=1), Session(stage, seed=20)
    together([short, long], [3, 20])
    together([short, long], [1, 1])


# a part that fails


def held(cache: StageCache) -> tuple[int, int, int]:
    return cache.tokens, cache.batch, cache.nbytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part: StepPart(part.hidden[..., :31], part.cache),
        lambda part: StepPart(part.hidden.repeat(2, 1, 1), part.cache),
        lambda part: StepPart(part.hidden, part.cache, torch.ones(1, 3)),
        lambda part: StepPart(part.hidden, part.cache, None, torch.zeros(1, 7, dtype=torch.long)),
    ],
    ids=["width", "rows", "mask", "positions"],
)
def test_a_part_of_the_wrong_shape_fails_alone(llama: Stage, spoil: Any) -> None:
    good, bad, other = (Session(llama, seed=seed) for seed in (1, 20, 40))
    together([good, bad, other], [4, 4, 4])
    before = held(bad.cache)
    steps = [session.step(1) for session in (good, bad, other)]
    parts = [steps[0][0], spoil(steps[1][0]), steps[2][0]]
    first, failed, last = llama.forward_many(parts)
    assert isinstance(failed, UsageError)
    assert held(bad.cache) == before
    assert_equal([first, last], [parts[0], parts[2]], [steps[0][1], steps[2][1]])


def test_a_part_that_fails_while_it_runs_fails_alone(llama: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad, other = (Session(llama, seed=seed) for seed in (1, 20, 40))
    together([good, bad, other], [4, 4, 4])
    before = held(bad.cache)
    steps = [session.step(1) for session in (good, bad, other)]
    append = type(bad.cache.layers[2]).update

    def full(layer: object, *args: object, **kwargs: object) -> object:
        if layer is bad.cache.layers[2]:
            raise RuntimeError("out of memory")
        return append(layer, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(bad.cache.layers[2]), "update", full)
        first, failed, last = llama.forward_many([part for part, _ in steps])
    assert isinstance(failed, RuntimeError)
    assert held(bad.cache) == before
    assert_equal([first, last], [steps[0][0], steps[2][0]], [steps[0][1], steps[2][1]])


def test_a_part_of_infinities_does_not_disturb_the_others(llama: Stage) -> None:
    good, bad = Session(llama, seed=1), Session(llama, seed=20)
    together([good, bad], [4, 4])
    part, wanted = good.step(1)
    spoiled = StepPart(torch.full((1, 1, 32), float("inf")), bad.cache)
    assert_equal(llama.forward_many([spoiled, part])[1:], [part], [wanted])


def test_a_session_has_one_step_at_a_time(llama: Stage) -> None:
    session = Session(llama)
    part, wanted = session.step(3)
    first, second = llama.forward_many([part, part])
    assert isinstance(second, UsageError)
    assert session.cache.tokens == 3
    assert_equal([first], [part], [wanted])
