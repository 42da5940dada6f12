"""Compiled decode steps compute what the stage computes without, and are loaded from nowhere but one's own.

Programs are traced here, and run as they were traced; the slow tests compile them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swarmkit.models.architecture.anatomy import replace
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.compiled.kinds import BlockKind, NotCompiledError, StageKinds, kinds_of
from swarmkit.models.compiled.shelf import PackageShelf
from swarmkit.models.compiled.steps import CompiledSteps, Program, Race, StepComparison
from swarmkit.models.compiled.trace import RowLinear, compile_step, export_step, make_view
from swarmkit.models.execution.stage import Stage
from swarmkit.models.kernels.blocked_linear import BlockedLinear

from .tiny import ARCHITECTURES, make_checkpoint, model_type_of
from .together import ONE_BY_ONE, Session, decode_and_cut_back, decode_beside_a_prompt, together

LENGTH = 48
BOUND = 1e-5


class Traced:
    """A traced program, run operation by operation."""

    def __init__(self, kind: BlockKind, rows: int, with_products: bool = False) -> None:
        self._rows = rows
        self._module = export_step(kind, rows, LENGTH, with_products).module()

    def __call__(self, arguments: list[Tensor]) -> Tensor:
        hidden, positions, *rest = arguments
        parts = [rest[low : low + self._rows] for low in range(0, 3 * self._rows, self._rows)]
        out: Tensor = self._module(hidden, positions, *parts, rest[3 * self._rows :])
        return out


def stage_of(checkpoints: Path, name: str) -> Stage:
    return Stage.load(Checkpoint.open(make_checkpoint(checkpoints, name)), 1, 4, dtype="float32")


def traced(kinds: StageKinds, rows: int) -> Any:
    return {digest: Traced(kind, rows) for digest, kind in kinds.kinds.items()}


@pytest.fixture(scope="module")
def llama_programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageKinds, dict[int, Any]]:
    stage = stage_of(tmp_path_factory.mktemp("llama"), "llama")
    kinds = kinds_of(stage)
    return kinds, {rows: traced(kinds, rows) for rows in (1, 3)}


@pytest.fixture
def llama(checkpoints: Path, llama_programs: tuple[StageKinds, dict[int, Any]]) -> Stage:
    stage = stage_of(checkpoints, "llama")
    kinds, programs = llama_programs
    assert kinds_of(stage) == kinds
    steps = CompiledSteps(stage, kinds, 3, LENGTH)
    for rows, found in programs.items():
        steps.put(rows, found)
    stage.decode_path = steps
    return stage


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts each pass through compiled steps had."""
    passes: list[int] = []
    step = CompiledSteps.step

    def counted(steps: CompiledSteps, parts: Any) -> Any:
        outputs = step(steps, parts)
        if outputs is not None:
            passes.append(len(outputs))
        return outputs

    monkeypatch.setattr(CompiledSteps, "step", counted)
    return passes


# kinds


def test_blocks_that_differ_in_weights_only_are_of_one_kind(checkpoints: Path) -> None:
    kinds = kinds_of(stage_of(checkpoints, "llama"))
    assert len(kinds.of_block) == 3
    assert list(kinds.kinds) == [kinds.of_block[0]]


def test_blocks_with_a_window_are_of_another_kind(checkpoints: Path) -> None:
    kinds = kinds_of(stage_of(checkpoints, "gemma2"))
    assert len(kinds.kinds) == 2
    assert kinds.of_block[0] == kinds.of_block[2] != kinds.of_block[1]


def test_a_kind_is_read_from_its_text(checkpoints: Path) -> None:
    for kind in kinds_of(stage_of(checkpoints, "gemma2")).kinds.values():
        assert BlockKind.parse(kind.text) == kind


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("bloom", "gemma3_text", "gpt2") else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_a_block_is_made_from_its_kind(checkpoints: Path, name: str) -> None:
    stage = stage_of(checkpoints, name)
    needs_masks = not stage.view_of(1, 4).needs_no_mask(torch.empty(1, 1, 32), 1)
    if needs_masks or model_type_of(name) in ONE_BY_ONE:
        with pytest.raises(NotCompiledError):
            kinds_of(stage)
        return
    for kind in kinds_of(stage).kinds.values():
        assert make_view(kind).attention == kind.attention  # it is described as the kind says, or this raises


def test_a_block_that_its_config_does_not_describe_is_refused(checkpoints: Path) -> None:
    stage = stage_of(checkpoints, "llama")
    stage.base.get_submodule("layers.1.self_attn").scaling = 0.5  # type: ignore[assignment]
    of_block = kinds_of(stage)
    assert len(of_block.kinds) == 2
    with pytest.raises(NotCompiledError, match="scaling"):
        make_view(of_block.kinds[of_block.of_block[1]])


# steps


def test_tokens_of_sessions_of_several_lengths(llama: Stage, compiled: list[int]) -> None:
    sessions = [Session(llama, seed=seed) for seed in (1, 20, 40)]
    together(sessions, [3, 1, 12])
    for _ in range(3):
        together(sessions, [1, 1, 1])
    together(sessions[1:2], [1])  # while the others have no token
    together([sessions[2], sessions[0]], [1, 1])  # two in a program for three
    assert compiled == [3, 3, 3, 1, 2]


def test_a_token_beside_a_prompt_runs_without(llama: Stage, compiled: list[int]) -> None:
    decode_beside_a_prompt(llama)
    assert compiled == [1, 2]


def test_more_sessions_than_there_are_programs_for_run_without(llama: Stage, compiled: list[int]) -> None:
    sessions = [Session(llama, seed=seed) for seed in range(0, 400, 100)]
    together(sessions, [3] * 4)
    together(sessions, [1] * 4)
    assert compiled == []
    together(sessions[:3], [1] * 3)
    together(sessions[3:], [1])  # there is no slot for it
    assert compiled == [3]


def test_a_session_that_outgrows_its_slot_goes_on(llama: Stage, compiled: list[int]) -> None:
    session = Session(llama)
    together([session], [LENGTH - 3])
    for _ in range(6):
        together([session], [1])
    assert session.cache.slot is None
    assert compiled == [1] * 2


def test_a_session_is_cut_back_in_its_slot(llama: Stage, compiled: list[int]) -> None:
    decode_and_cut_back(llama)
    assert compiled == [1, 1, 1]


def test_a_program_that_fails_is_not_used_again(
    llama: Stage, compiled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def failing(arguments: list[Tensor]) -> Tensor:
        raise RuntimeError("expected 21 inputs")

    kinds = kinds_of(llama)
    steps = CompiledSteps(llama, kinds, 3, LENGTH)
    steps.put(1, {kinds.of_block[0]: failing})  # type: ignore[dict-item]
    llama.decode_path = steps
    session = Session(llama)
    together([session], [5])
    together([session], [1])
    together([session], [1])
    assert compiled == []
    assert session.cache.slot is None
    assert sum("a compiled step failed" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_program_with_products_computes_the_same(checkpoints: Path, name: str) -> None:
    stage = stage_of(checkpoints, name)
    kinds = kinds_of(stage)
    comparison = StepComparison(stage, kinds, 1, LENGTH)
    program = Traced(kinds.kinds[kinds.of_block[0]], 1, with_products=True)
    assert comparison.difference(0, program) < BOUND  # type: ignore[arg-type]


def test_a_blocked_layer_stays_so_in_a_program_with_products(checkpoints: Path) -> None:
    stage = stage_of(checkpoints, "llama")
    path, layer = next(found for found in stage.base.named_modules() if type(found[1]) is nn.Linear)
    replace(stage.base, path, BlockedLinear.of(layer))
    kinds = kinds_of(stage)
    view = make_view(kinds.kinds[kinds.of_block[0]], with_products=True)
    forms = {type(one) for one in view.model.modules() if isinstance(one, nn.Linear)}
    assert forms == {BlockedLinear, RowLinear}


# comparing


def test_equal_steps_are_found_equal(
    checkpoints: Path, llama_programs: tuple[StageKinds, dict[int, Any]]
) -> None:
    stage, (kinds, programs) = stage_of(checkpoints, "llama"), llama_programs
    comparison = StepComparison(stage, kinds, 3, LENGTH)
    assert all(comparison.difference(i, programs[3][kinds.of_block[i]]) < BOUND for i in range(3))


@pytest.mark.parametrize("spoil", ["output", "key", "infinite"])
def test_a_step_that_differs_is_found(
    checkpoints: Path, llama_programs: tuple[StageKinds, dict[int, Any]], spoil: str
) -> None:
    stage, (kinds, programs) = stage_of(checkpoints, "llama"), llama_programs

    def wrong(arguments: list[Tensor]) -> Tensor:
        out: Tensor = programs[1][kinds.of_block[0]](arguments)
        if spoil == "key":
            keys, seen = arguments[3], len(arguments[2])
            keys[0, 0, seen - 1, 0] += 0.01
            return out
        return out * 1.001 if spoil == "output" else out + float("inf")

    found = StepComparison(stage, kinds, 1, LENGTH).difference(0, wrong)  # type: ignore[arg-type]
    assert found > 10 * BOUND


def test_both_steps_of_a_race_are_run(
    checkpoints: Path, llama_programs: tuple[StageKinds, dict[int, Any]], compiled: list[int]
) -> None:
    stage, (kinds, programs) = stage_of(checkpoints, "llama"), llama_programs
    race = Race(stage, kinds, 3, LENGTH)
    race.put(programs[3])
    race.step_eagerly()
    assert compiled == []
    race.step_compiled()
    assert compiled == [3]


# where programs come from


@pytest.fixture
def shelf(tmp_path: Path) -> PackageShelf:
    return PackageShelf(tmp_path / "compiled")


def put(shelf: PackageShelf, content: bytes = b"program") -> Path:
    with shelf.workplace() as place:
        (place / "made.pt2").write_bytes(content)
        return shelf.put("key", place / "made.pt2")


def test_a_program_is_found_as_it_was_put(shelf: PackageShelf) -> None:
    assert shelf.find("key") is None
    path = put(shelf)
    assert shelf.find("key") == path
    assert path.read_bytes() == b"program"
    assert stat.S_IMODE(shelf.folder.stat().st_mode) == 0o700
    assert sorted(one.suffix for one in shelf.folder.iterdir()) == [".json", ".pt2"]


def replace_by_a_link(path: Path) -> None:
    other = path.with_name("elsewhere")
    path.rename(other)
    path.symlink_to(other)


def note_nothing(path: Path) -> None:
    path.with_suffix(".json").write_text("{}")


def note_no_json(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"programs"),
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o620),
        lambda path: path.with_suffix(".json").chmod(0o602),
        lambda path: path.with_suffix(".json").unlink(),
        note_nothing,
        note_no_json,
        replace_by_a_link,
    ],
    ids=["longer", "empty", "group", "note", "no-note", "empty-note", "broken-note", "link"],
)
def test_a_program_that_was_changed_is_removed(shelf: PackageShelf, change: Callable[[Path], object]) -> None:
    path = put(shelf)
    change(path)
    assert shelf.find("key") is None
    assert not path.exists()
    assert not path.is_symlink()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_nothing_is_loaded_from_a_folder_that_others_can_open(shelf: PackageShelf, mode: int) -> None:
    put(shelf)
    shelf.folder.chmod(mode)
    with pytest.raises(NotCompiledError, match="chmod 700"):
        shelf.find("key")
    with pytest.raises(NotCompiledError, match="chmod 700"):
        PackageShelf(shelf.folder)


def test_nothing_is_loaded_from_a_folder_of_somebody_else(
    shelf: PackageShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(shelf)
    monkeypatch.setattr(os, "getuid", lambda: shelf.folder.stat().st_uid + 1)
    with pytest.raises(NotCompiledError, match="closed to all others"):
        shelf.find("key")


def test_a_program_that_its_user_died_of_is_not_tried_again(shelf: PackageShelf) -> None:
    path = put(shelf)
    if not (child := os.fork()):
        with shelf.trying(["key"]):
            os._exit(3)
    os.waitpid(child, 0)
    with pytest.raises(NotCompiledError, match="a server ended while it tried"):
        shelf.find("key")
    assert not path.exists()
    assert shelf.find("key") is None  # so that it is compiled anew


def test_a_program_that_is_being_tried_is_found(shelf: PackageShelf) -> None:
    path = put(shelf)
    with shelf.trying(["key"]):
        assert shelf.find("key") == path
    assert not list(shelf.folder.glob("*.trial"))


def test_a_folder_that_cannot_be_made_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotCompiledError, match="cannot be kept"):
        PackageShelf(tmp_path / "file" / "compiled")


def test_what_is_no_program_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "made.pt2").write_bytes(json.dumps({}).encode())
    with pytest.raises(NotCompiledError, match="cannot be loaded"):
        Program(tmp_path / "made.pt2")


# compiled


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("llama", [1, 2]), ("gemma2", [2])], ids=["llama", "gemma2"])
def test_a_compiled_program_computes_the_same(
    checkpoints: Path, name: str, sizes: list[int], tmp_path: Path, compiled: list[int]
) -> None:
    stage = stage_of(checkpoints, name)
    kinds = kinds_of(stage)
    steps = CompiledSteps(stage, kinds, 3, LENGTH)
    for rows in sizes:
        programs = {}
        for number, (digest, kind) in enumerate(kinds.kinds.items()):
            compile_step(kind, rows, LENGTH, tmp_path / f"{rows}-{number}.pt2")
            programs[digest] = Program(tmp_path / f"{rows}-{number}.pt2")
        comparison = StepComparison(stage, kinds, rows, LENGTH)
        assert all(
            comparison.difference(i, programs[digest]) < BOUND for i, digest in enumerate(kinds.of_block)
        )
        steps.put(rows, programs)
    stage.decode_path = steps
    sessions = [Session(stage, seed=seed) for seed in (1, 20)]
    together(sessions, [2, 1])
    for _ in range(3):
        together(sessions, [1, 1])
    together(sessions[:1], [1])
    assert compiled == [2, 2, 2, 1]
    for _ in range(6):  # until their windows are left behind, if there are some
        together(sessions, [1, 1])


@pytest.mark.slow
def test_products_with_one_row_are_compiled_to_the_same_numbers(checkpoints: Path, tmp_path: Path) -> None:
    stage = stage_of(checkpoints, "llama")
    kinds = kinds_of(stage)
    ((_, kind),) = kinds.kinds.items()
    compile_step(kind, 1, LENGTH, tmp_path / "made.pt2", with_products=True)
    comparison = StepComparison(stage, kinds, 1, LENGTH)
    assert comparison.difference(0, Program(tmp_path / "made.pt2")) < BOUND


@pytest.mark.slow
def test_products_with_blocked_weights_are_compiled_for_several_sessions(
    checkpoints: Path, tmp_path: Path
) -> None:
    stage = stage_of(checkpoints, "llama")
    for path, layer in list(stage.base.named_modules()):
        if type(layer) is nn.Linear:
            replace(stage.base, path, BlockedLinear.of(layer))
    kinds = kinds_of(stage)
    ((_, kind),) = kinds.kinds.items()
    assert {form for _, form, _ in kind.linear} == {"blocked"}
    compile_step(kind, 2, LENGTH, tmp_path / "blocked.pt2")
    comparison = StepComparison(stage, kinds, 2, LENGTH)
    assert comparison.difference(0, Program(tmp_path / "blocked.pt2")) < BOUND
