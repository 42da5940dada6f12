"""A process and all that it has started: what they use, what they may use, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from swarmkit.session_nice import write_session_nice


@dataclass(frozen=True)
class Used:
    """What a tree of processes uses.

    Attributes:
        cpu_s: processor time since each of them began, with that of children which have ended, where the
            system keeps it.
        ram_bytes: pages that several of them share count for each.
    """

    pids: frozenset[int]
    cpu_s: float
    ram_bytes: int


def used_by(*roots: int) -> Used:
    """Return what these processes and all that they have started use."""
    pids, cpu_s, ram = set(), 0.0, 0
    for process in _tree(*roots):
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
            pids.add(process.pid)
            ended_s = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
            cpu_s += times.user + times.system + ended_s
            ram += memory.rss
    return Used(frozenset(pids), cpu_s, ram)


def set_cores(root: int, cores: int | None) -> None:
    """Let a process and all that it has started run on so many cores; None: on all.

    Systems without such a bound (macOS) are left alone: there the number of threads is all that counts.
    """
    if not hasattr(os, "sched_getaffinity"):
        _set_cores_of_processes(root, cores)
        return
    mine = sorted(os.sched_getaffinity(0))
    chosen = mine if cores is None else mine[-cores:]  # systems prefer the first ones for everything else
    for process in _tree(root):
        with contextlib.suppress(psutil.Error):
            for thread in process.threads():
                with contextlib.suppress(OSError):  # threads end, too; those to come inherit it
                    os.sched_setaffinity(thread.id, chosen)


def end_tree(root: int) -> None:
    """End a process, its group, and all that it has started, at once. It is waited for by its owner."""
    processes = list(_tree(root))
    if sys.platform == "linux":
        # One that gets no processor could not act on its signal. Rights, kernel or process may be missing.
        with contextlib.suppress(OSError):
            if os.getsid(root) == root:
                write_session_nice(root, 0)
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(root) == root:  # never the group of somebody else
                os.killpg(root, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _set_cores_of_processes(root: int, cores: int | None) -> None:
    for process in _tree(root):
        with contextlib.suppress(psutil.Error, AttributeError):
            every = list(range(psutil.cpu_count() or 1))
            process.cpu_affinity(every if cores is None else every[-cores:])


def _tree(*roots: int) -> Iterator[psutil.Process]:
    for root in roots:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(root)
            yield process
            yield from process.children(recursive=True)
