"""Single tokens that run as CUDA graphs are those that each session would have got alone.

A CPU records nothing, but all else is the same there: slots, masks, rows without a token. Where there is an
accelerator, graphs are recorded.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.cuda_graphs import CudaGraphs, SlotBatch
from swarmkit.models.execution.stage import Stage, StepPart
from swarmkit.models.kv.static_slots import StaticSlots

from .tiny import ARCHITECTURES, make_checkpoint, model_type_of
from .together import (
    ONE_BY_ONE,
    Session,
    assert_equal,
    decode_and_cut_back,
    decode_beside_a_prompt,
    some_slowly,
    together,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SLOTS, LENGTH = 3, 48


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stage_of(checkpoints: Path, name: str, device: str) -> Stage:
    stage = Stage.load(
        Checkpoint.open(make_checkpoint(checkpoints, name)), 1, 4, dtype="float32", device=device
    )
    stage.enable_cuda_graphs(SLOTS, LENGTH)
    return stage


@pytest.fixture
def llama(checkpoints: Path, device: str) -> Stage:
    return stage_of(checkpoints, "llama", device)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts each recorded pass had."""
    passes: list[int] = []
    run = CudaGraphs.run

    def counted(graphs: CudaGraphs, parts: list[StepPart]) -> list[Tensor] | None:
        outputs = run(graphs, parts)
        if outputs is not None:
            passes.append(len(outputs))
        return outputs

    monkeypatch.setattr(CudaGraphs, "run", counted)
    return passes


@pytest.mark.parametrize("name", [some_slowly(name) for name in ARCHITECTURES])
def test_tokens_of_several_sessions(checkpoints: Path, device: str, name: str, recorded: list[int]) -> None:
    stage = stage_of(checkpoints, name, device)
    sessions = [Session(stage, seed=seed) for seed in (1, 20, 40)]
    together(sessions, [3, 1, 2])
    for _ in range(8):  # until some have left their windows behind, which takes masks
        together(sessions, [1, 1, 1])
    together(sessions[1:2], [1])  # while the others have no token
    together(sessions, [1, 1, 1])
    seen = stage.view_of(1, 4).needs_no_mask(torch.empty(1, 1, 32), 1)
    possible = seen and model_type_of(name) not in ONE_BY_ONE
    if device == "cpu":  # else it is the accelerator's libraries that decide
        assert bool(recorded) == possible
    elif not recorded:
        print(f"{name} is not recorded on this accelerator")


def test_a_token_beside_a_prompt_runs_without_graphs(llama: Stage, recorded: list[int]) -> None:
    decode_beside_a_prompt(llama)
    assert recorded == [1, 2]


def test_more_sessions_than_slots_run_without_graphs(llama: Stage, recorded: list[int]) -> None:
    sessions = [Session(llama, seed=seed) for seed in range(0, 100 * (SLOTS + 1), 100)]
    together(sessions, [3] * len(sessions))
    together(sessions, [1] * len(sessions))
    assert recorded == []
    together(sessions[:SLOTS], [1] * SLOTS)
    together(sessions, [1] * len(sessions))
    assert recorded == [SLOTS]


def test_a_session_that_ends_frees_its_slot(llama: Stage, recorded: list[int]) -> None:
    for seed in range(SLOTS + 2):
        session = Session(llama, seed=100 * seed)
        together([session], [4])
        together([session], [1])
        del session
    assert recorded == [1] * (SLOTS + 2)


def test_a_session_that_begins_anew_frees_its_slot(llama: Stage) -> None:
    sessions = [Session(llama, seed=100 * seed) for seed in range(SLOTS)]
    together(sessions, [4] * SLOTS)
    together(sessions, [1] * SLOTS)
    sessions[1].cache.clear()
    newcomer = Session(llama, seed=500)
    together([newcomer], [3])
    together([newcomer], [1])
    assert newcomer.cache.slot is not None


def test_a_session_that_outgrows_its_slot_goes_on(llama: Stage, recorded: list[int]) -> None:
    session = Session(llama)
    together([session], [LENGTH - 3])
    for _ in range(6):
        together([session], [1])
    assert session.cache.slot is None
    assert recorded == [1] * 3


def test_a_session_is_cut_back_in_its_slot(llama: Stage, recorded: list[int]) -> None:
    decode_and_cut_back(llama)
    assert recorded == [1, 1, 1]


def test_a_row_that_becomes_several_leaves_its_slot(llama: Stage) -> None:
    session = Session(llama)
    together([session], [9])
    together([session], [1])
    session.edit(10, [0, 0, 0])
    session.rows = 3
    together([session], [1])
    together([session], [2])
    session.edit(12, [1])
    session.rows = 1
    together([session], [1])
    together([session], [1])
    assert session.cache.slot is not None


def test_what_a_session_leaves_in_a_slot_does_not_reach_the_next(llama: Stage) -> None:
    spoiled = Session(llama, seed=1)
    together([spoiled], [9])
    infinite = StepPart(torch.full((1, 1, 32), float("inf")), spoiled.cache)
    llama.forward_many([infinite])
    llama.forward_many([infinite])
    del spoiled, infinite
    gc.collect()
    session = Session(llama, seed=20)
    together([session], [3])
    together([session], [1])
    assert session.cache.slot is not None
    assert session.cache.slot.row == 0


def test_a_session_recovers_from_a_token_that_was_too_large(llama: Stage) -> None:
    session = Session(llama)
    together([session], [9])
    together([session], [1])
    llama.forward_many([StepPart(torch.full((1, 1, 32), float("inf")), session.cache)])
    session.cache.edit(10)
    together([session], [1])


def test_a_slot_counts_as_the_tokens_that_it_holds(llama: Stage) -> None:
    session = Session(llama)
    together([session], [9])
    together([session], [1])
    assert session.cache.slot is not None
    assert session.cache.nbytes() == session.twin.nbytes()
    assert session.cache.pages_held() == session.twin.pages_held()
    assert session.cache.has_pages


def test_pages_are_copied_from_a_slot(llama: Stage) -> None:
    session = Session(llama)
    together([session], [32])
    together([session], [1])
    assert session.cache.slot is not None
    for mine, others in zip(session.cache.page(0), session.twin.page(0), strict=True):
        for one, other in zip(mine, others, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_blocks_that_cannot_be_recorded_run_without_graphs(
    llama: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(batch: SlotBatch) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(SlotBatch, "make_mask", fail)
    session = Session(llama)
    together([session], [5])
    together([session], [1])
    together([session], [1])
    assert sum("cannot be recorded" in line for line in caplog.messages) == 1


def test_slots_are_freed_when_nothing_can_be_recorded(llama: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[weakref.ref[Tensor]] = []
    take = StaticSlots.take

    def watched(slots: StaticSlots, *args: Any) -> Any:
        taken = take(slots, *args)
        pools.extend(weakref.ref(part) for part in slots.pool(0))
        return taken

    def fail(batch: SlotBatch) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(StaticSlots, "take", watched)
    monkeypatch.setattr(SlotBatch, "make_mask", fail)
    session = Session(llama)
    together([session], [5])
    together([session], [1])
    gc.collect()
    assert pools
    assert [pool() for pool in pools if pool() is not None] == []
    assert session.cache.slot is None


def test_a_session_leaves_a_slot_that_was_released(llama: Stage) -> None:
    slots = StaticSlots(1, LENGTH)
    session = Session(llama)
    together([session], [5])
    assert session.cache.acquire_slot(slots) is not None
    slots.release()
    together([session], [2])
    assert session.cache.slot is None
    assert session.cache.acquire_slot(slots) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_record_that_fails_leaves_the_accelerator_as_it_was(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(checkpoints, "llama", "cuda")
    make_mask = SlotBatch.make_mask

    def look(batch: SlotBatch) -> None:
        make_mask(batch)
        batch.positions().sum().item()  # which waits, and so cannot be recorded

    monkeypatch.setattr(SlotBatch, "make_mask", look)
    session = Session(stage)
    together([session], [5])
    together([session], [1])
    assert torch.randn(3, device="cuda").isfinite().all()


def test_some_blocks_of_a_stage(llama: Stage, recorded: list[int]) -> None:
    given = [torch.randn(1, tokens, 32) for tokens in (4, 1, 1)]
    mine, alone = llama.new_cache(2, 3), llama.new_cache(2, 3)
    for hidden in given:
        part = StepPart(hidden, mine)
        assert_equal(llama.forward_many([part]), [part], [llama.forward(hidden, alone)])
    assert recorded == [1, 1]
