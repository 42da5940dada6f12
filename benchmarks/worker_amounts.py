"""Rows of `worker_limits.py` with amounts: how much the worker uses beside a limit, and how soon it stops."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.worker_bench import COMPUTE_ENDS_S, MEMORY_ENDS_S, MODELS, WATCH_S, Bench, Measured, wait_for
from swarmkit.sizes import format_bytes, format_data
from swarmkit.worker.governor import Governor
from swarmkit.worker.pause import Haste
from swarmkit.worker.policy import allowed
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.settings import WorkerLimits

_RATE = 300_000.0
_ABOVE_RATE = 1.1
"""The node reports what it has sent and received twice a second."""
_TAKES_HOLD_S = 2.0
_STOPS_S = 35.0
"""Sessions have 30 s to move away, and the node some more to end; what they move counts until then."""
_REMEMBERED_S = 35.0
"""The worker looks at so much of the past for the node's highest rate, and somewhat less."""


def cores(bench: Bench) -> Measured:
    """How many processors the node keeps busy."""
    without, used = _cores_used(bench, cpu_cores=1)
    return Measured("CPU cores", "1", f"{used:.2f}", used <= 1.05, f"{without:.2f}")


def compute_share(bench: Bench) -> Measured:
    """For which part of the time it computes."""
    without, used = _cores_used(bench, compute_share=0.25)
    part = used / without
    return Measured("share of computing time", "0.25", f"{part:.2f} of the processor time", part <= 0.3, "1")


def _cores_used(bench: Bench, **limit: float) -> tuple[float, float]:
    with bench.load():
        without = bench.cores_used()
        bench.set(**limit)
        time.sleep(_TAKES_HOLD_S)
        return without, bench.cores_used()


def upload(bench: Bench) -> Measured:
    """Bytes per second that it sends."""
    with bench.load():
        without, _ = bench.rates()
        bench.set(upload_bytes_per_s=_RATE)
        time.sleep(_TAKES_HOLD_S)
        sent, _ = bench.rates()
    return _rate("upload", sent, without)


def download(bench: Bench) -> Measured:
    """Bytes per second that it receives."""
    with bench.load():
        _, without = bench.rates()
        bench.set(download_bytes_per_s=_RATE)
        time.sleep(2 * _TAKES_HOLD_S)  # what had arrived before is handed on
        _, received = bench.rates()
    return _rate("download", received, without)


def _rate(limit: str, found: float, without: float) -> Measured:
    set_to, measured, free = (f"{value / 1e6:.2f} MB/s" for value in (_RATE, found, without))
    return Measured(limit, set_to, measured, found <= _RATE * _ABOVE_RATE, free)


def memory(bench: Bench) -> Measured:
    """The most memory that its processes have."""
    with bench.load():
        without = _most_memory(bench)
    most = 2**30
    bench.renew(ram_bytes=most)
    with bench.load():
        peak = _most_memory(bench)
    return Measured(
        "memory", format_bytes(most), f"{format_bytes(peak)} at most", peak <= most, format_bytes(without)
    )


def _most_memory(bench: Bench) -> int:
    peak = 0
    for _ in range(int(WATCH_S * 10)):
        peak = max(peak, used_by(bench.pid()).ram_bytes)
        time.sleep(0.1)
    return peak


def disk(bench: Bench) -> Measured:
    """Two models of one size, one after the other, with room for one and a half."""
    size = _size(bench.models[0])
    most = size * 3 // 2
    peaks = []
    for limit in (most, 20 * most):
        with _Watched(lambda: _size(bench.weights)) as watched:
            bench.renew(disk_bytes=limit)
            for model in MODELS:
                bench.serve(model)
        peaks.append(watched.most)
        bench.serve("tiny-chat")
    return Measured(
        "disk for weights",
        f"{format_data(most)}, and two models of {format_data(size)}",
        f"{format_data(peaks[0])} at most",
        size <= peaks[0] <= most,
        format_data(peaks[1]),
    )


class _Watched:
    """Looks at a number ten times a second, inside `with`, and keeps the largest."""

    def __init__(self, look: Callable[[], int]) -> None:
        self._look, self._ended = look, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most = 0

    def __enter__(self) -> _Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.most = max(self.most, self._look())


def _size(folder: Path) -> int:
    """Bytes of all weights in a folder. A file that is renamed meanwhile is counted once."""
    found: dict[int, int] = {}
    for file in folder.rglob("*"):
        if file.suffix in (".safetensors", ".part"):
            with contextlib.suppress(FileNotFoundError):  # it goes while this looks
                state = file.stat()
                found[state.st_ino] = state.st_size
    return sum(found.values())


def quota(bench: Bench) -> Measured:
    """Bytes that it moves until it stops, and while it does."""
    bench.set(upload_bytes_per_s=2e6, download_bytes_per_s=2e6)
    # The worker ends the node earlier the more it moved at once in the last half minute, which was without
    # these limits.
    time.sleep(_REMEMBERED_S)
    used = bench.client.status().month_bytes
    most = used + 30_000_000
    bench.set(month_bytes=most, upload_bytes_per_s=2e6, download_bytes_per_s=2e6)
    bench.wait("serving", "working")
    with bench.load():
        wait_for(lambda: bench.client.status().reason == "quota", "the quota is used up")
        wait_for(lambda: bench.client.status().node is None, "the worker has stopped", _STOPS_S)
    moved = bench.client.status().month_bytes - used
    return Measured(
        "a month's data (the last 30 MB of it)", "30.0 MB", f"{moved / 1e6:.1f} MB", moved <= most - used
    )


def pause(bench: Bench, haste: Haste) -> Measured:
    """How soon a pause that somebody chooses stops it, under load."""
    with bench.load():
        ended = bench.end(lambda: bench.client.pause(haste=haste))
    set_to = f"no computing after {COMPUTE_ENDS_S:g} s, memory back after {MEMORY_ENDS_S:g} s"
    return Measured(f"a pause under load (`{haste}`)", set_to, str(ended), ended.is_in_time(0.0))


def temperature(_: Bench) -> Measured:
    """In a model of a device that would reach 95 °C: there is no sensor on most test machines."""
    allowance = msgspec.structs.replace(allowed(WorkerLimits(), "away"), temperature_c=75.0)
    governor, heat, hottest = Governor(), 30.0, 0.0
    for _second in range(3600):
        governor = governor.after(1.0, allowance, round(heat))
        heat += (30.0 + governor.share * 65.0 - heat) * (1 - math.exp(-1 / 60.0))
        hottest = max(hottest, heat)
    return Measured(
        "temperature (simulated device)", "75 °C", f"{hottest:.1f} °C at most", hottest <= 75.0, "95 °C"
    )
