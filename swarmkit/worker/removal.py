"""Taking swarmkit away from this computer, for one person: its processes, then start-up entries and files.

What is to go is decided by `to_remove`, purely. `stop_all` and `remove` do it.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

from swarmkit.errors import SwarmkitError, UsageError
from swarmkit.worker import autostart
from swarmkit.worker.belongings import UNIT, own_folders, program_folder, startup_entries, store_folders
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.handle import Handle, NoWorkerError
from swarmkit.worker.control.values import Belonging, Belongings
from swarmkit.worker.places import WorkerPlaces, write_atomically

Keepable = Literal["settings", "identity", "weights", "history"]
TRAY_REQUEST = "tray.open"
"""A file in the runtime folder by which other programs of the person ask the tray for something."""
TRAY_PID = "tray.pid"
"""A file in the runtime folder with the tray's process id."""
QUIT = "quit"
"""What stands in the request when the tray is to end."""
POLITE_S = 45.0
"""More than sessions usually have to move away."""
_TERMINATE_S = 10.0
_KILL_S = 5.0
_LOOK_S = 0.25
_SYSTEMCTL_S = 60.0
_ORDER = {"startup": 0, "desktop": 1, "running": 3, "program": 4}
"""Everything else goes between."""


class RemovalError(SwarmkitError):
    """Something of swarmkit could not be ended or taken away; the message says what."""


@dataclass(frozen=True)
class RunningProcess:
    """A process that ends before files are taken away."""

    pid: int
    what: str


def kept(names: Iterable[str]) -> frozenset[Keepable]:
    """Return what a person asks to keep, by name. Pure.

    Raises:
        UsageError: a name is none of `Keepable`.
    """
    known: dict[str, Keepable] = {name: name for name in get_args(Keepable)}
    wanted = [name.strip() for name in names if name.strip()]
    for name in wanted:
        if name not in known:
            raise UsageError(f"{name!r} cannot be kept; what can is {', '.join(known)}")
    return frozenset(known[name] for name in wanted)


def to_remove(found: Belongings, keep: frozenset[Keepable]) -> list[Belonging]:
    """Return what goes, in this order: what starts swarmkit, its data, and last the program itself. Pure."""
    going = [part for part in found.parts if part.kind not in keep]
    return sorted(going, key=lambda part: (_ORDER.get(part.kind, 2), part.kind))


def running_processes(places: WorkerPlaces | None = None) -> list[RunningProcess]:
    """Return this person's worker and tray, their child processes, and what an installed program runs."""
    found: dict[int, str] = {}
    for worker in _places(places):
        for what, pid, of in (
            ("worker", _worker_pid(worker), worker.handle),
            ("tray", _tray_pid(worker), worker.runtime / TRAY_PID),
        ):
            if pid is not None and _has_written(pid, of):
                found = dict.fromkeys(_children(pid), f"process of the {what}") | found | {pid: what}
    for pid in _of_installed_program():
        found.setdefault(pid, "program that runs from swarmkit's environment")
    for pid in _self_and_ancestors():
        found.pop(pid, None)
    return [RunningProcess(pid, what) for pid, what in sorted(found.items())]


def stop_all(places: WorkerPlaces | None = None) -> None:
    """End this person's tray, worker and other programs of swarmkit: by asking, then by their process ids.

    Raises:
        RemovalError: a process does not end.
    """
    _stop_unit()
    processes = _living(running_processes(places))
    for worker in _places(places):
        if worker.runtime.is_dir() and _tray_pid(worker) is not None:
            with contextlib.suppress(OSError):
                write_atomically(worker.runtime / TRAY_REQUEST, QUIT.encode())
        with contextlib.suppress(SwarmkitError):
            WorkerClient(worker).stop()
    asked = [process for process in processes if not _is_of_program(process)]
    _wait(asked, POLITE_S)
    processes = _living(running_processes(places), processes)
    for end, within_s in ((psutil.Process.terminate, _TERMINATE_S), (psutil.Process.kill, _KILL_S)):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        processes = _wait(processes, within_s)
    if processes:
        raise RemovalError(
            f"these processes of swarmkit do not end: {', '.join(str(each.pid) for each in processes)}. "
            "End them, then try again"
        )


def remove(
    parts: Sequence[Belonging],
    places: WorkerPlaces | None = None,
    on_removed: Callable[[Belonging], None] = lambda part: None,
) -> list[str]:
    """Take parts away, and folders that are empty then. Returns what could not be taken away, in words."""
    left = []
    if sys.platform == "win32" and any(part.kind == "startup" for part in parts):
        autostart.switch(False)
    # The folders are asked for while their libraries are still there: this program may be in one of them.
    emptied = [*own_folders(places), *store_folders(places), *{path.parent for path in startup_entries()}]
    for part in parts:
        if sys.platform == "win32" and part.kind == "program":
            continue  # Windows does not remove what runs; the set-up's removal does it afterwards
        trouble = _take_away(Path(part.path))
        if trouble:
            left.append(trouble)
        else:
            on_removed(part)
    for folder in emptied:
        _prune(folder)
    return left


def _prune(folder: Path) -> None:
    """Remove a folder with the empty folders in it, unless something is left there."""
    with contextlib.suppress(OSError):
        for inner in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):
            if inner.is_dir() and not inner.is_symlink():
                with contextlib.suppress(OSError):
                    inner.rmdir()
        folder.rmdir()


def _take_away(path: Path) -> str:
    """Remove a file, a link or a folder; returns why that failed, in words."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return ""


def _places(places: WorkerPlaces | None) -> list[WorkerPlaces]:
    if places is not None:
        return [places]
    return list(dict.fromkeys((WorkerPlaces.of_this_person(), WorkerPlaces.usual())))


def _worker_pid(places: WorkerPlaces) -> int | None:
    if sys.platform == "win32":
        return None  # it runs in WSL2, where process ids are others
    try:
        return Handle.read(places.handle).pid
    except (NoWorkerError, UsageError):
        return None


def _tray_pid(places: WorkerPlaces) -> int | None:
    try:
        return int((places.runtime / TRAY_PID).read_text())
    except (OSError, ValueError):
        return None


def _has_written(pid: int, file: Path) -> bool:
    """Whether the process with this id can be the one that wrote a file: it is older, and this person's.

    After a crash the id may belong to another program.
    """
    try:
        process = psutil.Process(pid)
        same = process.username() == psutil.Process().username()
        return same and process.create_time() <= file.stat().st_mtime + 1.0
    except (psutil.Error, OSError):
        return False


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _of_installed_program() -> list[int]:
    """Processes of this person whose program lies in the folder in which installers put it."""
    own = psutil.Process().username()
    found = []
    for process in psutil.process_iter(["username", "cmdline"]):
        command = process.info["cmdline"] or [""]
        if process.info["username"] == own and Path(command[0]).is_relative_to(program_folder()):
            found.append(process.pid)
    return found


def _is_of_program(process: psutil.Process) -> bool:
    """Whether it is neither worker nor tray, which are asked, but some command of swarmkit's environment."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "worker" not in words and "tray" not in words and process.pid in _of_installed_program()
    return False


def _self_and_ancestors() -> list[int]:
    own = psutil.Process()
    return [own.pid, *(parent.pid for parent in own.parents())]


def _living(found: Sequence[RunningProcess], before: Sequence[psutil.Process] = ()) -> list[psutil.Process]:
    """The processes that still run: of those that were found before, and those that were found now."""
    processes = set(before)
    for each in found:
        with contextlib.suppress(psutil.Error):
            processes.add(psutil.Process(each.pid))
    return sorted(filter(_lives, processes), key=lambda process: process.pid)


def _wait(processes: Sequence[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Wait until processes have ended; returns those that have not."""
    living = list(filter(_lives, processes))
    for _ in range(round(within_s / _LOOK_S)):
        if not living:
            break
        psutil.wait_procs(living, timeout=_LOOK_S)
        living = list(filter(_lives, living))
    return living


def _lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended exists until its parent asks for its exit code."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _stop_unit() -> None:
    """Let systemd stop the worker that it runs for this person, so that it does not start it again."""
    if sys.platform != "linux" or shutil.which("systemctl") is None:
        return
    for order in (["disable", "--now", UNIT], ["reset-failed", UNIT]):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                ["systemctl", "--user", "--quiet", *order],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_SYSTEMCTL_S, check=False,
            )  # fmt: skip
