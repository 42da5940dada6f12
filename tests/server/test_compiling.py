"""A server has its decode step compiled beside its work, and goes on without where that cannot be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import torch
from torch import nn

from swarmkit import LocalSwarm
from swarmkit.events import Event, Owner, StepCompiled, StepNotCompiled
from swarmkit.models.checkpoint.checkpoint import Checkpoint
from swarmkit.models.compiled import build
from swarmkit.models.execution.stage import Stage
from swarmkit.models.head.head import load_local
from swarmkit.models.kernels.compiled_products import may_be_faster
from swarmkit.server.engine.compiling import StepCompiler, program_key, sizes_up_to, will_compile, worth_s
from swarmkit.server.engine.engine import Engine
from swarmkit.settings import EngineSettings, ServerSettings

from ..client.answers import answer, at, prompt
from ..models.tiny import make_checkpoint
from ..sessions import grouped_by_sessions, session_nice
from ..waiting import eventually, wait_until

OWNER = Owner("server", "peer")
COMPILED_WITHIN = 600.0
"""Seconds in which a compiler that has the lowest priority is done, whatever else the machine does."""
COMPILES = pytest.mark.timeout(2 * COMPILED_WITHIN + 180)
"""A test that compiles twice at most. It is the wait for the compiler that is to say what has not come."""


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine("test")
    yield engine
    await asyncio.to_thread(engine.close)


class Compiling:
    """A compiler of steps, and what it has told."""

    def __init__(self, stage: Stage, engine: Engine, folder: Path, **settings: Any) -> None:
        self.told: list[Event] = []
        usual = {"compile": "on", "compile_slots": 1, "compile_tokens": 512}
        chosen = EngineSettings().replace(**usual | settings)
        self.compiler = StepCompiler(stage, engine, chosen, self._tell, folder)

    def _tell(self, kind: Any, *values: object) -> None:
        self.told.append(kind(*values, time=0.0, owner=OWNER))


def stage_of(folder: Path, name: str = "llama") -> Stage:
    return Stage.load(Checkpoint.open(make_checkpoint(folder, name)), 1, 4, dtype="float32")


def test_there_are_programs_for_powers_of_two_and_the_most_that_may_be() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(4) == [1, 2, 4]
    assert sizes_up_to(6) == [1, 2, 4, 6]


def test_what_a_program_was_made_for_is_in_its_name() -> None:
    others = [("b", 1, 512), ("a", 2, 512), ("a", 1, 1024), ("a", 1, 512, True)]
    names = {program_key(*made) for made in [("a", 1, 512), *others]}  # type: ignore[arg-type]
    assert len(names) == 5
    assert all(name.isalnum() for name in names)
    assert program_key("a", 1, 512) in names


def test_compiling_never_takes_longer_than_decoding_has_taken() -> None:
    takes_s = worth_s(0)
    assert [worth_s(compiled) for compiled in range(4)] == [takes_s * (compiled + 1) for compiled in range(4)]


async def test_a_server_that_has_hardly_decoded_compiles_nothing_of_its_own_accord(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # the first thing that it would tell
    stage = stage_of(tmp_path)
    here = Compiling(stage, engine, tmp_path / "compiled", compile="auto")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(here.compiler.run)
        await anyio.sleep(1.2)
        assert here.told == []
        engine.learned_of(stage).decode_s = 3.0
        await eventually(lambda: here.told, "a server that is used and would compile")


async def test_without_a_compiler_the_reason_is_told(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    here = Compiling(stage_of(tmp_path), engine, tmp_path / "compiled")
    await here.compiler.run()
    (told,) = here.told
    assert isinstance(told, StepNotCompiled)
    assert "no C++ compiler named no-such-compiler" in str(told)
    assert here.compiler.steps is None
    assert told.reason == here.compiler.reason


def test_whether_a_server_will_compile_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EngineSettings().replace(compile="on")
    assert will_compile(settings)
    assert not will_compile(settings.replace(compile="off"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not will_compile(settings)


async def test_blocks_that_cannot_be_compiled_are_a_reason(tmp_path: Path, engine: Engine) -> None:
    here = Compiling(stage_of(tmp_path, "bloom"), engine, tmp_path / "compiled")
    await here.compiler.run()
    assert [type(event) for event in here.told] == [StepNotCompiled]
    assert "cannot run together" in here.compiler.reason


async def test_a_folder_that_others_can_open_is_a_reason(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "compiled").mkdir(mode=0o755)
    here = Compiling(stage_of(tmp_path), engine, tmp_path / "compiled")
    await here.compiler.run()
    assert "closed to all others" in here.compiler.reason


async def test_a_closed_engine_ends_it_without_a_word(tmp_path: Path) -> None:
    engine = Engine("test")
    here = Compiling(stage_of(tmp_path), engine, tmp_path / "compiled")
    await asyncio.to_thread(engine.close)
    await here.compiler.run()
    assert here.told == []


def compilers() -> list[int]:
    """Processes below this one that compile."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@contextlib.asynccontextmanager
async def compiling_process(here: Compiling) -> AsyncIterator[int]:
    """Have it compile until the end of the block; the process that does."""
    before = set(compilers())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(here.compiler.run)
        await eventually(lambda: set(compilers()) - before, "a process that compiles")
        yield min(set(compilers()) - before)
        tasks.cancel_scope.cancel()


@grouped_by_sessions
async def test_other_sessions_come_before_that_of_a_compiler(tmp_path: Path, engine: Engine) -> None:
    async with compiling_process(Compiling(stage_of(tmp_path), engine, tmp_path / "compiled")) as compiler:
        await eventually(lambda: session_nice(compiler).endswith(" nice 19"), "its session's priority")


async def test_who_stops_ends_the_compiler(tmp_path: Path, engine: Engine) -> None:
    before = set(compilers())
    here = Compiling(stage_of(tmp_path), engine, tmp_path / "compiled")
    async with compiling_process(here):
        pass
    await eventually(lambda: set(compilers()) <= before, "the end of that process")
    assert [path.name for path in (tmp_path / "compiled").iterdir() if path.is_dir()] == []
    assert here.told == []


@pytest.mark.slow
@COMPILES
async def test_a_step_is_compiled_once_and_kept(tmp_path: Path, engine: Engine) -> None:
    folder = tmp_path / "compiled"
    stage = stage_of(tmp_path)
    first = Compiling(stage, engine, folder)
    with anyio.fail_after(COMPILED_WITHIN):
        await first.compiler.run()
    assert {type(event) for event in first.told} == {StepCompiled}, first.compiler.reason
    assert first.compiler.steps is not None
    assert first.compiler.steps.sizes == (1,)
    made = {package: package.stat().st_mtime_ns for package in folder.glob("*.pt2")}
    assert len(made) == 2  # without products and with them
    were_faster = len(first.told) == 2
    shapes = {layer.weight.shape for layer in stage.base.modules() if isinstance(layer, nn.Linear)}
    threads = torch.get_num_threads()
    assert {may_be_faster(shape, torch.float32, threads) for shape in shapes} == {were_faster}
    second = Compiling(stage_of(tmp_path), engine, folder)
    await second.compiler.run()
    assert {type(event) for event in second.told} == {StepCompiled}
    assert {package: package.stat().st_mtime_ns for package in folder.glob("*.pt2")} == made
    damaged = min(made)
    damaged.write_bytes(damaged.read_bytes()[:-100])  # a disk that was full
    third = Compiling(stage_of(tmp_path), engine, folder)
    with anyio.fail_after(COMPILED_WITHIN):
        await third.compiler.run()
    assert {type(event) for event in third.told} == {StepCompiled}
    assert damaged.stat().st_mtime_ns != made[damaged]


def building() -> list[psutil.Process]:
    """Processes below this one that compile for some server."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if build.__name__ in child.cmdline():
                found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("kept_fork_server")
def test_a_server_that_is_killed_leaves_no_compiler_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMKIT_STORE_DIR", str(tmp_path / "store"))
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "llama"))
    settings = ServerSettings().replace(compile="on", compile_slots=1, compile_tokens=512)
    with LocalSwarm(checkpoint, 1, processes=True, server_settings=settings) as swarm:
        wait_until(building, "a process that compiles")
        (compiler,) = building()
        wait_until(lambda: compiler.nice() == 19, "its low priority")
        swarm.servers[0].kill()
        wait_until(lambda: not compiler.is_running() or not building(), "the end of that process")


@pytest.fixture
def compiled(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalSwarm]:
    """Two servers of all blocks of a tiny model, the architecture of which is the parameter; steps of both
    are compiled.
    """
    monkeypatch.setenv("SWARMKIT_STORE_DIR", str(tmp_path / "store"))
    changes = {"sliding_window": 512} if request.param == "gemma2" else {}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, request.param, **changes))
    settings = ServerSettings().replace(compile="on", compile_slots=1, compile_tokens=512)
    with LocalSwarm(checkpoint, 2, transport="memory", server_settings=settings) as swarm:
        for told in [server.events.subscribe(8, StepCompiled, StepNotCompiled) for server in swarm.servers]:
            found: list[Event] = []
            wait_until(
                lambda: found.extend(told.pending()) or found,  # type: ignore[func-returns-value]  # noqa: B023
                "compiled steps",
                within=COMPILED_WITHIN,
            )
            assert [type(event) for event in found] == [StepCompiled]
        yield swarm


def local_answer(swarm: LocalSwarm) -> list[list[int]]:
    return answer(load_local(swarm.checkpoint), prompt(5)[0], new_tokens=24).tolist()


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("compiled", ["llama", "gemma2"], indirect=True)
def test_a_swarm_with_compiled_steps_answers_as_the_local_model(compiled: LocalSwarm) -> None:
    assert answer(compiled.model(), prompt(5)[0], new_tokens=24).tolist() == local_answer(compiled)


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("compiled", ["llama"], indirect=True)
def test_a_server_without_compiled_steps_goes_on_where_one_with_them_was_killed(compiled: LocalSwarm) -> None:
    first, model = compiled.servers[0], compiled.model()
    without = ServerSettings().replace(compile="off")
    actions = {3: lambda: compiled.add_server(first.blocks, settings=without), 7: first.kill}
    found = answer(model, prompt(5)[0], new_tokens=24, logits_processor=at(actions))
    assert found.tolist() == local_answer(compiled)
    assert not first.alive
