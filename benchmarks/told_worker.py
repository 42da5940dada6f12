"""A worker that senses this machine, but for what a file says. It runs in a process of its own.

python -m benchmarks.told_worker FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from swarmkit.worker.main import run_worker
from swarmkit.worker.sensing.machine import OwnMachine, SensingOrder
from swarmkit.worker.signals import GpuSignals, MachineSignals


class ToldMachine:
    """This machine, but for what a file says: a JSON object with some of `MachineSignals`' attributes."""

    def __init__(self, path: Path) -> None:
        self._own, self._path = OwnMachine(), path

    def sense(self, order: SensingOrder) -> MachineSignals:
        """See `MachineSensing.sense`."""
        told = msgspec.json.decode(self._path.read_bytes()) if self._path.exists() else {}
        if "gpu" in told:
            told["gpu"] = msgspec.convert(told["gpu"], GpuSignals)
        return msgspec.structs.replace(self._own.sense(order), **told)

    def limit_watts(self, watts: float | None) -> bool:
        """See `MachineSensing.limit_watts`."""
        return self._own.limit_watts(watts)


if __name__ == "__main__":
    run_worker(sensing=ToldMachine(Path(sys.argv[1])))
