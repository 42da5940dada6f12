"""Is each limit of the worker kept, and how soon does it get out of the way?

    python benchmarks/worker_limits.py            prints the table
    python benchmarks/worker_limits.py --write    also writes the results and docs/limits.md

It takes about three minutes. `swarmkit worker run` serves tiny-chat on this machine, a client keeps it as
busy as it can, and one limit after the other is set. What is measured is the whole tree of the node's
processes, from outside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from swarmkit import SwarmModelForCausalLM
from swarmkit.bench.environment import environment
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.handle import NoWorkerError
from swarmkit.worker.control.values import Status
from swarmkit.worker.governor import Governor
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.policy import allowed
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.settings import WorkerLimits

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "worker-limits.json"
PAGE = ROOT / "docs" / "limits.md"
TABLE = "<!-- the table below is written by `python benchmarks/worker_limits.py --write` -->\n"

WATCH_S = 6.0
ROWS, TOKENS = 1, 512
"""Of a request of the load; its hidden states travel both ways."""
MANY = 1e12


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    limit: str
    set_to: str
    measured: str
    kept: bool
    without: str = ""
    """The same without the limit."""


class Bench:
    """A worker, and a client that keeps it busy."""

    def __init__(self, home: Path) -> None:
        self.client = WorkerClient(WorkerPlaces.inside(home))
        self._stop = threading.Event()
        self._environment = {**os.environ, "SWARMKIT_WORKER_HOME": str(home)}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        command = [sys.executable, "-m", "swarmkit.cli", "worker", "run"]
        worker = subprocess.Popen(command, env=self._environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: self.client.runs, "the worker answers")
            rules = {
                "presence": "headless",
                "on_battery": True,
                "on_metered": True,
                "busy_cpu": {"in_use": 1.0, "away": 1.0},
            }
            self.client.change_settings(
                {"agreed": True, "serve": {"model": "tiny-chat"}, "rules": rules, "limits": limits()}
            )
            self.wait("serving")
            yield
        finally:
            worker.terminate()
            worker.wait(60)

    def wait(self, *states: str) -> Status:
        wait_for(lambda: self.client.status().state in states, f"the worker is {states}")
        return self.client.status()

    def set(self, **changed: float | None) -> None:
        """Set some limits, and lift all others."""
        self.client.change_settings({"limits": limits(**changed)})

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Keep the node busy with requests whose hidden states go there and back whole."""
        node = self.client.status().node
        assert node is not None
        self._stop.clear()
        with SwarmModelForCausalLM.from_pretrained("tiny-chat", initial_peers=node.addresses) as model:
            blocks = model.blocks[0 : model.config.num_hidden_layers]
            hidden = torch.randn(ROWS, TOKENS, model.config.hidden_size)
            with torch.no_grad():
                blocks(hidden)
            threads = [threading.Thread(target=self._ask, args=(blocks, hidden)) for _ in range(2)]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                self._stop.set()
                for thread in threads:
                    thread.join()

    def _ask(self, blocks: Any, hidden: torch.Tensor) -> None:
        with torch.no_grad(), contextlib.suppress(Exception):  # the node is ended under it
            while not self._stop.is_set():
                blocks(hidden)

    def pid(self) -> int:
        node = self.client.status().node
        assert node is not None
        return node.pid

    def cores_used(self) -> float:
        """Processor time of the node's processes for each second."""
        pid, began = self.pid(), time.monotonic()
        before = used_by(pid).cpu_s
        time.sleep(WATCH_S)
        return (used_by(pid).cpu_s - before) / (time.monotonic() - began)

    def rates(self) -> tuple[float, float]:
        """Bytes per second that the node sends and receives, over some seconds."""
        before, began = self.client.status().all, time.monotonic()
        time.sleep(2 * WATCH_S)
        after, passed = self.client.status().all, time.monotonic() - began
        return (
            (after.sent_bytes - before.sent_bytes) / passed,
            (after.received_bytes - before.received_bytes) / passed,
        )


def limits(**changed: float | None) -> dict[str, Any]:
    """Settings in which some limits are set, and all others so high that they limit nothing."""
    open_: dict[str, float | None] = {
        "cpu_cores": None,
        "compute_share": 1.0,
        "ram_bytes": 8 * 2**30,
        "upload_bytes_per_s": None,
        "download_bytes_per_s": None,
        "month_bytes": None,
        "disk_free_bytes": 0,
        "temperature_c": 110.0,
    }
    values = {**open_, **changed}
    return {name: {"in_use": value, "away": value} for name, value in values.items()}


def wait_for(holds: Callable[[], object], what: str, within_s: float = 120.0) -> float:
    """Wait until something holds; returns how long that took, in seconds."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(NoWorkerError):
            if holds():
                return time.monotonic() - began
        if time.monotonic() - began > within_s:
            raise SystemExit(f"did not come about: {what}")
        time.sleep(0.01)


# ---------------------------------------------------------------------- one row after the other


def cores(bench: Bench) -> Measured:
    bench.set()
    with bench.load():
        without = bench.cores_used()
        bench.set(cpu_cores=1)
        time.sleep(2)
        used = bench.cores_used()
    return Measured("CPU cores", "1", f"{used:.2f}", used <= 1.05, f"{without:.2f}")


def compute_share(bench: Bench) -> Measured:
    bench.set()
    with bench.load():
        without = bench.cores_used()
        bench.set(compute_share=0.25)
        time.sleep(2)
        used = bench.cores_used()
    part = used / without
    return Measured("share of computing time", "0.25", f"{part:.2f} of the processor time", part < 0.5, "1")


def upload(bench: Bench) -> Measured:
    bench.set()
    with bench.load():
        without, _ = bench.rates()
        bench.set(upload_bytes_per_s=300_000.0)
        time.sleep(2)
        sent, _ = bench.rates()
    return Measured(
        "upload", "0.30 MB/s", f"{sent / 1e6:.2f} MB/s", sent <= 330_000, f"{without / 1e6:.2f} MB/s"
    )


def download(bench: Bench) -> Measured:
    bench.set()
    with bench.load():
        _, without = bench.rates()
        bench.set(download_bytes_per_s=300_000.0)
        time.sleep(4)  # what had arrived before is handed on
        _, received = bench.rates()
    return Measured(
        "download",
        "0.30 MB/s",
        f"{received / 1e6:.2f} MB/s",
        received <= 330_000,
        f"{without / 1e6:.2f} MB/s",
    )


def memory(bench: Bench) -> Measured:
    most = 2**30
    bench.set(ram_bytes=most)
    bench.wait("stopping", "starting", "serving")
    time.sleep(2)
    bench.wait("serving")
    peak = 0
    with bench.load():
        for _ in range(int(WATCH_S * 10)):
            peak = max(peak, used_by(bench.pid()).ram_bytes)
            time.sleep(0.1)
    return Measured("memory", f"{most / 2**30:.1f} GiB", f"{peak / 2**30:.2f} GiB at most", peak <= most)


def pause(bench: Bench, haste: str) -> Measured:
    bench.set()
    bench.wait("serving", "working")
    with bench.load():
        pids = used_by(bench.pid()).pids
        bench.client.pause(haste=haste)  # type: ignore[arg-type]
        seconds = wait_for(
            lambda: not any(psutil.pid_exists(pid) for pid in pids), "all processes have ended"
        )
    bench.client.resume()
    bench.wait("serving", "working")
    set_to = {"prompt": "no computing after 1 s, memory back after 3 s", "now": "at once"}[haste]
    measured = f"all processes, and so their memory, gone after {seconds:.2f} s"
    return Measured(f"a pause under load ({haste})", set_to, measured, seconds < 3.0)


def quota(bench: Bench) -> Measured:
    used = bench.client.status().month_bytes
    most = used + 30_000_000
    bench.set(month_bytes=most, upload_bytes_per_s=2e6, download_bytes_per_s=2e6)
    bench.wait("serving", "working")
    with bench.load():
        wait_for(lambda: bench.client.status().reason == "quota", "the quota is used up")
        bench.wait("paused")
    after = bench.client.status().month_bytes
    bench.set()
    bench.wait("serving")
    return Measured(
        "a month's data (the last 30 MB of it)",
        "30.0 MB",
        f"{(after - used) / 1e6:.1f} MB",
        after <= most,
    )


def temperature() -> Measured:
    """In a model of a device that would reach 95 °C: there is no sensor on most test machines."""
    allowance = msgspec.structs.replace(allowed(WorkerLimits(), "away"), temperature_c=75.0)
    governor, heat, hottest = Governor(), 30.0, 0.0
    for _ in range(3600):
        governor = governor.after(1.0, allowance, round(heat))
        heat += (30.0 + governor.share * 65.0 - heat) * (1 - math.exp(-1 / 60.0))
        hottest = max(hottest, heat)
    return Measured(
        "temperature (simulated device)", "75 °C", f"{hottest:.1f} °C at most", hottest <= 75.0, "95 °C"
    )


def table(rows: list[Measured]) -> str:
    lines = ["| limit | set to | measured | without it | kept |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row.limit} | {row.set_to} | {row.measured} | {row.without} | {'yes' if row.kept else '**no**'} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure all, and show it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    logging.getLogger("swarmkit").setLevel(logging.ERROR)  # the swarm ends under the client, again and again
    rows: list[Measured] = [temperature()]
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        with bench.running():
            for measure in (cores, compute_share, upload, download, memory, quota):
                rows.append(measure(bench))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
            rows += [pause(bench, "prompt"), pause(bench, "now")]
    print(table(rows))
    if write:
        result = {**environment(), "command": "python benchmarks/worker_limits.py --write"}
        result["rows"] = [asdict(row) for row in rows]
        RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        head, mark, _ = PAGE.read_text().partition(TABLE)
        made = f"Measured on {result['date'][:10]} on {result['machine']['cores']} cores.\n\n"
        PAGE.write_text(f"{head}{mark}\n{made}{table(rows)}")
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
