"""Loading a stage, its cache, and what it refuses."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swarmkit.errors import ModelError, UsageError
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.execution.full_sequences import FullSequencePass, FullSequences
from swarmkit.models.execution.stage import Stage, StageCache
from swarmkit.models.execution.view import View
from swarmkit.models.plan import cache_cost

from .tiny import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Path) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(checkpoints, "llama", num_blocks=4))


@pytest.fixture(scope="module")
def stage(checkpoint: Checkpoint) -> Stage:
    return Stage.load(checkpoint, 1, 4)


def hidden(batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(batch * 100 + tokens))


def filled(stage: Stage, batch: int = 2, tokens: int = 5) -> StageCache:
    cache = stage.new_cache(1, 4)
    stage.forward(hidden(batch, tokens), cache)
    return cache


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "gpt_oss"])
def test_a_stage_needs_only_the_files_of_its_own_blocks(tmp_path: Path, model_type: str) -> None:
    folder = make_checkpoint(tmp_path, model_type, num_blocks=6, shards=5)
    checkpoint = Checkpoint.open(folder)
    needed = {checkpoint.weight_map[key] for key in checkpoint.block_keys(2, 4)}
    others = {file.name for file in folder.glob("*.safetensors")} - needed
    assert others
    for name in others:
        (folder / name).unlink()
    Stage.load(Checkpoint.open(folder), 2, 4)
    with pytest.raises(ModelError, match="lacks the file"):
        Stage.load(Checkpoint.open(folder), 0, 6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped in a file")
def test_a_loaded_stage_keeps_no_file_mapped(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", num_blocks=3, shards=3)
    stage = Stage.load(Checkpoint.open(folder), 0, 3)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert stage.stop == 3


def test_a_stage_reads_only_the_tensors_of_its_own_blocks(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, keys: original(self, read_keys(read, keys)))
    Stage.load(checkpoint, 1, 3)
    assert set(read) == set(checkpoint.block_keys(1, 3))


def read_keys(into: list[str], keys: object) -> list[str]:
    wanted = list(keys)  # type: ignore[call-overload]
    into.extend(wanted)
    return wanted


def test_a_stage_keeps_no_embedding_and_no_norm(stage: Stage) -> None:
    outside = {name: p.numel() for name, p in stage.base.named_parameters() if not name.startswith("layers.")}
    assert outside == {}


def test_loading_tells_its_progress(checkpoint: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    Stage.load(checkpoint, 1, 4, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_results_have_the_dtype_of_the_stage(checkpoint: Checkpoint, dtype: str, wanted: torch.dtype) -> None:
    stage = Stage.load(checkpoint, 0, 2, dtype=dtype)
    cache = stage.new_cache(0, 2)
    out = stage.forward(hidden(1, 3).to(torch.float16), cache)
    assert (stage.dtype, out.dtype, out.is_contiguous()) == (wanted, wanted, True)
    assert cache.nbytes() == 3 * 2 * cache_cost(checkpoint, wanted).token_bytes


def test_an_unknown_dtype_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError, match="bfloat16"):
        Stage.load(checkpoint, 0, 1, dtype="int3")


def test_loading_does_not_touch_the_random_state(checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    Stage.load(checkpoint, 0, 2)
    assert torch.equal(torch.rand(3), wanted)


def test_several_stages_may_load_at_once(checkpoint: Checkpoint) -> None:
    loaded: dict[int, Stage] = {}

    def load(block: int) -> None:
        dtype = torch.bfloat16 if block % 2 else torch.float32
        loaded[block] = Stage.load(checkpoint, block, block + 1, dtype=dtype)

    threads = [threading.Thread(target=load, args=(block,)) for block in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [loaded[block].dtype for block in range(4)] == [torch.float32, torch.bfloat16] * 2
    assert torch.get_default_dtype() == torch.float32


def spoiled(tmp_path: Path, key: str, value: torch.Tensor | None) -> Checkpoint:
    folder = make_checkpoint(tmp_path, "llama", num_blocks=2)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(key, None)
    if value is not None:
        tensors[key] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"misses weights: layers\.0\.mlp\.up_proj"),
        ("model.layers.1.mlp.extra.weight", torch.zeros(1), r"unknown weights: .*extra"),
        (
            "model.layers.1.mlp.up_proj.weight",
            torch.zeros(3, 3),
            r"up_proj\.weight is \[3, 3\], not \[48, 32\]",
        ),
    ],
)
def test_nothing_is_made_up(tmp_path: Path, key: str, value: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Stage.load(spoiled(tmp_path, key, value), 1, 2)


def test_a_block_that_is_missing_altogether(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "llama", num_blocks=2))
    checkpoint.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="no weights for block 2"):
        Stage.load(checkpoint, 2, 3)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (-1, 2), (2, 2), (3, 1)])
def test_a_range_outside_the_model_is_refused(checkpoint: Checkpoint, start: int, stop: int) -> None:
    with pytest.raises(UsageError, match="has 4"):
        Stage.load(checkpoint, start, stop)


def test_a_cache_outside_the_stage_is_refused(checkpoint: Checkpoint, stage: Stage) -> None:
    with pytest.raises(UsageError, match="not all in this stage"):
        stage.new_cache(0, 2)
    with pytest.raises(UsageError, match="another stage"):
        stage.forward(hidden(1, 1), Stage.load(checkpoint, 0, 2).new_cache(1, 2))


@pytest.mark.parametrize(
    ("shape", "mask", "positions", "message"),
    [
        ((2, 1, 31), None, None, "Hidden states"),
        ((2, 0, 32), None, None, "Hidden states"),
        ((3, 1, 32), None, None, "batch of 2"),
        ((2, 1, 32), (2, 5), None, r"\[2, 6\]"),
        ((2, 1, 32), None, (2, 2), "Position ids"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_leave_the_cache(
    stage: Stage,
    shape: tuple[int, ...],
    mask: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
    message: str,
) -> None:
    cache = filled(stage, batch=2, tokens=5)
    options = {
        "attention_mask": None if mask is None else torch.ones(mask),
        "position_ids": None if positions is None else torch.zeros(positions, dtype=torch.long),
    }
    with pytest.raises(UsageError, match=message):
        stage.forward(torch.zeros(shape), cache, **options)
    assert (cache.tokens, cache.batch) == (5, 2)


def test_a_step_that_fails_half_way_leaves_the_cache(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(stage, tokens=5)
    size = cache.nbytes()
    stage.forward(hidden(2, 1), cache)
    cache.edit(5)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(stage.base.layers[2], "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            stage.forward(hidden(2, 1), cache)
    assert (cache.tokens, cache.nbytes()) == (5, size)


def test_a_cache_counts_from_empty_to_full_and_back(stage: Stage) -> None:
    cache = stage.new_cache(2, 4)
    assert (cache.tokens, cache.batch, cache.nbytes()) == (0, 0, 0)
    stage.forward(hidden(2, 3), cache)
    assert (cache.start, cache.stop, cache.tokens, cache.batch) == (2, 4, 3, 2)
    cache.clear()
    assert (cache.tokens, cache.batch, cache.nbytes()) == (0, 0, 0)
    stage.forward(hidden(5, 1), cache)
    assert (cache.tokens, cache.batch) == (1, 5)


def test_an_edit_that_changes_nothing_copies_nothing(stage: Stage) -> None:
    cache = filled(stage)
    before = [layer.keys for layer in cache.layers]
    for order in (None, [0, 1], range(2)):
        cache.edit(5, order)
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))


def test_an_edit_keeps_tokens_then_selects_rows(stage: Stage) -> None:
    cache = filled(stage, batch=2, tokens=5)
    before = cache.layers[0].keys
    cache.edit(3, [1, 1, 0])
    assert torch.equal(cache.layers[0].keys, before[[1, 1, 0], :, :3])
    cache.edit(0, [7])
    assert (cache.tokens, cache.batch) == (0, 0)


@pytest.mark.parametrize(("keep", "order"), [(6, None), (-1, None), (5, [2]), (5, [-1]), (5, [])])
def test_an_impossible_edit_changes_nothing(stage: Stage, keep: int, order: list[int] | None) -> None:
    cache = filled(stage, batch=2, tokens=5)
    with pytest.raises(UsageError):
        cache.edit(keep, order)
    assert (cache.tokens, cache.batch) == (5, 2)


def test_sessions_of_one_stage_do_not_see_each_other(stage: Stage) -> None:
    alone = stage.forward(hidden(1, 1), filled(stage, 1, 4))
    one, other = filled(stage, 1, 4), filled(stage, 3, 6)
    stage.forward(hidden(3, 2), other)
    assert torch.equal(stage.forward(hidden(1, 1), one), alone)


# ---------------------------------------------------------------------- gradients


def backward(stage: Stage, grad: Tensor, inputs: FullSequences) -> Tensor:
    run = FullSequencePass(stage, inputs, grad)
    while run.left:
        run.advance(2)
    return run.result()


def test_gradients_of_two_stages_are_those_of_one(checkpoint: Checkpoint) -> None:
    whole = Stage.load(checkpoint, 0, 4)
    first, second = Stage.load(checkpoint, 0, 3), Stage.load(checkpoint, 2, 4)
    given, grad = hidden(2, 5), hidden(2, 5).flip(0)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    between = first.forward(given, first.new_cache(0, 3), **options)
    through = backward(second, grad, FullSequences(between, 3, 4, **options))
    parts = backward(first, through, FullSequences(given, 0, 3, **options))
    wanted = backward(whole, grad, FullSequences(given, 0, 4, **options))
    torch.testing.assert_close(parts, wanted, atol=1e-5, rtol=1e-5)
    assert parts.abs().max() > 0.1
    assert not parts.requires_grad
    assert not given.requires_grad


def test_a_gradient_of_another_shape_is_refused(stage: Stage) -> None:
    with pytest.raises(UsageError, match="gradient"):
        FullSequencePass(stage, FullSequences(hidden(1, 2), 1, 2), hidden(1, 3))
    with pytest.raises(UsageError, match="not all in this stage"):
        FullSequencePass(stage, FullSequences(hidden(1, 2), 0, 2), hidden(1, 2))


# ---------------------------------------------------------------------- states that cannot be cut back


@pytest.fixture(scope="module")
def recurrent(checkpoints: Path) -> Stage:
    return Stage.load(Checkpoint.open(make_checkpoint(checkpoints, "qwen3_next")), 1, 4)


class Steps:
    """A session and the numbers of tokens that its stage really ran."""

    def __init__(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stage = stage
        self.cache = stage.new_cache(1, 4)
        self.inputs = torch.zeros(1, 0, 32)
        self.ran: list[int] = []
        original = View.__call__

        def count(view: View, given: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.ran.append(given.shape[1])
            return original(view, given, *rest)

        monkeypatch.setattr(View, "__call__", count)

    def step(self, tokens: int) -> list[int]:
        """Run so many new tokens, and compare with a session that ran all at once."""
        self.ran.clear()
        past = self.inputs.shape[1]
        new = hidden(1, past + tokens)[:, past:]
        self.inputs = torch.cat([self.inputs, new], dim=1)
        out = self.stage.forward(new, self.cache)
        ran = list(self.ran)
        wanted = self.stage.forward(self.inputs, self.stage.new_cache(1, 4))[:, past:]
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
        return ran

    def crop(self, tokens: int) -> None:
        self.cache.edit(tokens)
        self.inputs = self.inputs[:, :tokens]


def test_speculative_steps_go_back_one_step_and_no_further(
    recurrent: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Steps(recurrent, monkeypatch)
    assert session.step(20) == [20]
    for accepted, run_again in ((22, []), (23, [2]), (26, [1]), (26, [3])):
        assert session.step(4) == [*run_again, 4]
        session.crop(accepted)
    # The step that was cut back began at 26, so nothing of it is run again.
    assert session.step(4) == [4]


def test_without_a_state_before_the_cut_all_is_run_again(
    recurrent: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmkit.models.execution.stage.CATCH_UP_TOKENS", 4)
    session = Steps(recurrent, monkeypatch)
    session.step(12)
    session.step(1)
    session.crop(10)
    assert session.step(1) == [4, 4, 2, 1]


def test_long_decoding_goes_back_a_bounded_way(recurrent: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Steps(recurrent, monkeypatch)
    session.step(3)
    new = hidden(1, 200)
    for position in range(3, 200):
        recurrent.forward(new[:, position : position + 1], session.cache)
    held = session.cache.nbytes()
    session.cache.edit(190)
    session.ran.clear()
    recurrent.forward(new[:, 190:191], session.cache)
    assert sum(session.ran) <= 64
    assert session.cache.history is not None
    assert len(session.cache.history.marks) == 2
    assert session.cache.nbytes() <= held


def test_a_step_that_fails_leaves_the_state(recurrent: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Steps(recurrent, monkeypatch)
    session.step(6)
    session.step(1)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(recurrent.base.layers[2], "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            recurrent.forward(hidden(1, 2), session.cache)
    assert session.cache.tokens == 7
    session.step(2)
