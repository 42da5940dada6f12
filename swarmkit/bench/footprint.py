"""What does it take to serve: processes, memory, and seconds until the first client may come?"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from swarmkit.bench.options import FootprintBenchmark
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local.server_process import ServerProcess
from swarmkit.models.plan import block_bytes


@dataclass(frozen=True)
class Footprint:
    """Of one server and all of its processes. `memory_bytes` is PSS: shared pages count in parts."""

    processes: int
    memory_bytes: int
    ready_s: float
    joined_s: float
    """From the start of the process until it had joined the swarm."""
    loaded_s: float
    """From the start of the process until its blocks were loaded."""


def measure(options: FootprintBenchmark, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Start a server of the first `blocks` blocks, look at it, end it; medians over rounds.

    It has measured its own speed by the time it serves, so that all of its weights have been used. The first
    round, which finds the files of the model cold, is not counted.
    """
    found, imports = [], []
    for number in range(options.rounds + 1):
        on_progress("starting a server", number, options.rounds + 1)
        imports_s = _imports_s()
        footprint = _start_once(subject, options.blocks, options.threads, options.dtype)
        if number:
            found.append(footprint)
            imports.append(imports_s)
    on_progress("done", options.rounds + 1, options.rounds + 1)
    weights = options.blocks * block_bytes(subject.checkpoint, getattr(torch, options.dtype))
    memory = statistics.median(each.memory_bytes for each in found)
    return {
        **options.values("blocks", "rounds", "threads", "dtype"),
        "processes": max(each.processes for each in found),
        "memory_kind": _memory_kind(),
        "memory_bytes": int(memory),
        "weights_bytes": weights,
        "memory_beyond_weights_bytes": int(memory) - weights,
        "ratio_to_weights": round(memory / weights, 3),
        "joined_s": round(statistics.median(each.joined_s for each in found), 3),
        "loaded_s": round(statistics.median(each.loaded_s for each in found), 3),
        "ready_s": round(statistics.median(each.ready_s for each in found), 3),
        "imports_s": round(statistics.median(imports), 3),
        "ready_ratio_to_imports": round(
            statistics.median(each.ready_s / s for each, s in zip(found, imports, strict=True)), 3
        ),
    }


def _imports_s() -> float:
    """Seconds of a process that imports torch and transformers, and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, transformers"], check=True)
    return time.perf_counter() - began


def _start_once(subject: Subject, blocks: int, threads: int, dtype: str) -> Footprint:
    began, began_at = time.perf_counter(), time.time()
    server = ServerProcess(
        subject.checkpoint.name, [], (0, blocks), public_name="measured", threads=threads, dtype=dtype
    )
    try:
        server.start()
        ready_s = time.perf_counter() - began
        root = psutil.Process(server.pid)
        family = [root, *root.children(recursive=True)]
        return Footprint(
            len(family),
            sum(_memory_bytes(process) for process in family),
            ready_s,
            joined_s=server.event_dates["server_joined"] - began_at,
            loaded_s=server.event_dates["blocks_loaded"] - began_at,
        )
    finally:
        server.stop(drain_timeout=0.0)


def _memory_kind() -> str:
    return "pss" if hasattr(psutil.Process().memory_full_info(), "pss") else "uss"


def _memory_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(getattr(process.memory_full_info(), _memory_kind()))
    return 0
