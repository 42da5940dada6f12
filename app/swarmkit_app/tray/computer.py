"""What this computer has to lend, and limits that suit it. For the first steps; nothing is changed here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import psutil

from swarmkit.errors import SwarmkitError
from swarmkit.sizes import GIB
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.sensing.nvidia import Gpu, gpus
from swarmkit.worker.sensing.probes import UnknownError

_TEST_WITHIN_S = 180.0


@dataclass(frozen=True)
class Computer:
    """Memory and disk in bytes."""

    cores: int
    memory: int
    disk_free: int
    gpus: tuple[Gpu, ...] = ()


class DeviceTestError(SwarmkitError):
    """The device could not be tested; the message says why."""


def programs_that_run() -> list[str]:
    """Names of this person's programs that run now, from which those at which to pause can be chosen."""
    own = psutil.Process()
    person, ours = own.username(), used_by(own.pid).pids
    names = {
        process.info["name"]
        for process in psutil.process_iter(["name", "username"])
        if process.info["username"] == person and process.pid not in ours and process.info["name"]
    }
    return sorted(names, key=str.casefold)


def this_computer(folder: str) -> Computer:
    """Return what this computer has; the disk is the one of a folder."""
    return Computer(
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        disk_free=psutil.disk_usage(folder).free,
        gpus=_gpus(),
    )


def suggested(computer: Computer) -> dict[str, Any]:
    """Return changes of the worker's settings that leave most of a computer to its owner. Pure.

    In use: one core and an eighth of the memory. Away: all cores but one, and half of the memory. The disk
    keeps nine tenths of what is free, and 20 GiB are enough.
    """
    memory = _rounded(computer.memory // 8), _rounded(computer.memory // 2)
    limits = {
        "cpu_cores": {"in_use": 1, "away": max(1, computer.cores - 1)},
        "ram_bytes": {"in_use": memory[0], "away": memory[1]},
        "disk_bytes": dict.fromkeys(("in_use", "away"), min(20 * GIB, _rounded(computer.disk_free // 10))),
    }
    device = computer.gpus[0].device if computer.gpus else "cpu"
    return {"serve": {"device": device}, "limits": limits}


def measured(device: str) -> dict[str, Any]:
    """Measure a device for some seconds, in a process of its own, so that torch stays out of the tray.

    Returns:
        `name`, `tflops` (float32 products of matrices, 10^12 operations per second) and `gb_per_s` (read and
        written memory, 10^9 bytes per second).

    Raises:
        DeviceTestError: it does not work.
    """
    command = [sys.executable, "-m", "swarmkit_app.tray.device_test", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TEST_WITHIN_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceTestError(f"the test of {device} did not end: {error}") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
        raise DeviceTestError(f"{device} cannot compute here: {last[0]}")
    return dict(json.loads(done.stdout))


def _rounded(bytes_: int) -> int:
    """Down to whole halves of a GiB, but not to nothing."""
    half = GIB // 2
    return max(half, bytes_ // half * half)


def _gpus() -> tuple[Gpu, ...]:
    try:
        return gpus()
    except UnknownError:  # without NVIDIA's driver there is no GPU of theirs
        return ()
