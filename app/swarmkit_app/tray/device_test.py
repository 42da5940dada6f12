"""Measure a device: `python -m swarmkit_app.tray.device_test cuda:0`. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

_SECONDS = 3.0
_SIDE = 1024
_FLOATS = 32 * 2**20


def main() -> None:
    """Test the device that the command line names."""
    device = torch.device(sys.argv[1])
    left, right = (torch.rand(_SIDE, _SIDE, device=device) for _ in range(2))
    source = torch.rand(_FLOATS, device=device)
    target = torch.empty_like(source)
    products = _per_second(lambda: torch.mm(left, right), device)
    copies = _per_second(lambda: target.copy_(source), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    result = {
        "name": name,
        "tflops": round(products * 2 * _SIDE**3 / 1e12, 3),
        "gb_per_s": round(copies * 2 * 4 * _FLOATS / 1e9, 1),
    }
    sys.stdout.write(json.dumps(result) + "\n")


def _per_second(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS / 2:
        for _ in range(4):
            work()
        wait()
        done += 4
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
