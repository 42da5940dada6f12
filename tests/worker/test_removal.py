"""Removal shows what there is, ends what runs, takes away what is to go, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from swarmkit.cli.commands import app
from swarmkit.errors import UsageError
from swarmkit.models.checkpoint.store import BlockStore
from swarmkit.worker import autostart, removal
from swarmkit.worker.belongings import APP_ID, LAUNCHER_MARK, UNIT, belongings, kind_of
from swarmkit.worker.control.values import Belonging, Belongings
from swarmkit.worker.removal import kept, running_processes, to_remove
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, "-m", "swarmkit.cli"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["uninstall", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def files_of(home: Path) -> set[str]:
    """All files in a folder, and the folders that are swarmkit's, by relative path."""
    found = (path for path in home.rglob("*") if not path.is_dir() or "swarmkit" in path.name)
    return {str(path.relative_to(home)) for path in found}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a person who has other things than swarmkit's."""
    home = tmp_path / "home"
    for path in (
        ".config/other/settings",
        ".local/bin/other",
        ".cache/huggingface/hub/models--x/config.json",
    ):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text("mine")
    run_time = tmp_path / "run"
    run_time.mkdir(mode=0o700)
    for name in [name for name in os.environ if name.startswith(("XDG_", "SWARMKIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_time))
    return home


@pytest.fixture
def lived_in(home: Path) -> Path:
    """The same home after the tray was installed, and used for a while."""
    made = {
        ".config/swarmkit/worker.json": b"{}",
        ".config/swarmkit/worker.json.unusable": b"?",
        ".local/state/swarmkit/worker/contributions.sqlite": b"rows",
        ".local/state/swarmkit/worker/identity.key": b"key",
        ".local/state/swarmkit/worker/pause.json": b"{}",
        ".local/state/swarmkit/worker/worker.log": b"line",
        ".local/state/swarmkit/worker/worker.log.1": b"line",
        ".local/state/swarmkit/bootstrap-1.key": b"key",
        ".cache/swarmkit/store/blobs/a.safetensors": b"\0" * 5_000_000,
        ".cache/swarmkit/store/index/a.json": b"{}",
        ".cache/swarmkit/file-hashes.json": b"{}",
        ".local/share/swarmkit/envs/1/bin/python": b"",
        f".local/share/applications/{APP_ID}.desktop": b"",
        f".local/share/icons/hicolor/64x64/apps/{APP_ID}.png": b"",
        ".local/bin/swarmkit": b"#!/bin/sh\n# " + LAUNCHER_MARK,
        f".config/systemd/user/default.target.wants/{UNIT}": b"",
    }
    for name, content in made.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    autostart.switch(True)
    return home


def test_what_there_is_is_shown_with_its_size_and_stays(lived_in: Path) -> None:
    before = files_of(lived_in)
    shown = run("--what")
    assert "5.0 MB  weights of models" in shown
    assert f"{autostart.entry_path()}" in shown
    assert files_of(lived_in) == before


def test_every_file_of_swarmkit_is_listed(lived_in: Path) -> None:
    paths = [Path(part.path) for part in belongings().parts]
    foreign = {lived_in / ".config/other/settings", lived_in / ".local/bin/other"}
    foreign.add(lived_in / ".cache/huggingface/hub/models--x/config.json")
    files = {path for path in lived_in.rglob("*") if path.is_file()}
    assert {file for file in files if not any(file.is_relative_to(path) for path in paths)} == foreign


def test_removal_leaves_no_file_and_no_start_up_entry(lived_in: Path) -> None:
    run("--yes")
    left = {path for path in lived_in.rglob("*") if path.is_file() or "swarmkit" in path.name}
    assert {path.read_text() for path in left} == {"mine"}


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("settings", ".config/swarmkit/worker.json"),
        ("identity", ".local/state/swarmkit/worker/identity.key"),
        ("weights", ".cache/swarmkit/store/blobs/a.safetensors"),
        ("history", ".local/state/swarmkit/worker/contributions.sqlite"),
    ],
)
def test_what_the_person_asks_to_keep_stays_and_nothing_else(lived_in: Path, kind: str, file: str) -> None:
    run("--yes", "--keep", kind)
    assert (lived_in / file).exists()
    assert {part.kind for part in belongings().parts} == {kind}


def test_only_what_can_be_kept_is_kept() -> None:
    with pytest.raises(UsageError, match="'programs' cannot be kept; what can is settings"):
        kept(["settings", "programs"])


def test_nobody_is_surprised_by_a_removal_in_a_script(lived_in: Path) -> None:
    before = files_of(lived_in)
    with pytest.raises(UsageError, match="--yes"):
        CliRunner().invoke(app, ["uninstall"], catch_exceptions=False)
    assert files_of(lived_in) == before


def test_a_store_in_a_folder_with_other_files_leaves_these(
    lived_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = lived_in / "big disk"
    monkeypatch.setenv("SWARMKIT_STORE_DIR", str(shared))
    store = BlockStore()
    part = store.partial("block 0")
    store.reserve(part, 100)
    store.keep(part, "model", "block 0", "0" * 64, "hub")
    (shared / "film").write_text("mine")
    run("--yes")
    assert files_of(shared) == {"film"}


def test_a_launcher_of_somebody_else_is_not_touched(home: Path) -> None:
    launcher = home / ".local" / "bin" / "swarmkit"
    launcher.write_text("#!/bin/sh\nexec pipx run swarmkit\n")
    run("--yes")
    assert launcher.exists()


def test_the_program_goes_last_and_what_starts_it_first() -> None:
    found = Belongings(
        parts=tuple(
            Belonging(kind=kind, what="", path=kind, size_bytes=1)
            for kind in ("program", "weights", "startup", "running")
        ),
        size_bytes=4,
    )
    order = [part.kind for part in to_remove(found, frozenset())]
    assert order == ["startup", "weights", "running", "program"]


def test_files_are_told_apart_by_name() -> None:
    names = ("worker.json.unusable", "contributions.sqlite-wal", "my.key", "tray.pid", "holiday.jpg")
    assert [kind_of(name) for name in names] == ["settings", "history", "identity", "running", "other"]


Start = Callable[..., Callable[[], int]]


@pytest.fixture
def start(home: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a command of swarmkit. Returns what waits for its end, and returns its exit code.

    A shell is its parent: removal waits for the processes that it ends, and would take the exit code away.
    """
    started: list[subprocess.Popen[bytes]] = []
    code = tmp_path / "exit code"

    def start(*command: str) -> Callable[[], int]:
        shell = ["sh", "-c", '"$@"; echo $? >"$0"', str(code), *MAIN, *command]
        process = subprocess.Popen(shell, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)

        def end() -> int:
            process.wait(10)
            return int(code.read_text())

        return end

    yield start
    for process in started:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
        process.wait(10)


def runs(what: str) -> bool:
    return any(process.what == what for process in running_processes())


@pytest.mark.slow
@pytest.mark.parametrize("state", ["running", "paused"])
def test_removal_ends_tray_and_worker_politely(home: Path, start: Start, state: str) -> None:
    before = files_of(home)
    tray = start("tray", "--host", "none", "--link")
    wait_until(lambda: runs("tray") and runs("worker"), "tray and worker run")
    if state == "paused":
        subprocess.run([*MAIN, "worker", "pause"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    told = json.loads(run("--what", "--json"))
    assert {"tray", "worker"} <= {process["what"] for process in told["processes"]}
    run("--yes")
    assert tray() == 0  # it was asked, not killed
    assert running_processes() == []
    assert files_of(home) == before


@pytest.mark.slow
def test_a_worker_that_does_not_answer_is_ended_by_its_id(
    home: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "POLITE_S", 1.0)
    before = files_of(home)
    worker = start("worker", "run")
    wait_until(lambda: runs("worker"), "the worker runs")
    (pid,) = (process.pid for process in running_processes() if process.what == "worker")
    os.kill(pid, signal.SIGSTOP)
    run("--yes")
    assert worker() == 128 + signal.SIGKILL
    assert running_processes() == []
    assert files_of(home) == before
