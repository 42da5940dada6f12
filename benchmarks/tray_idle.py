"""What does the tray cost while nothing happens?

    python -m benchmarks.tray_idle            prints it; takes eleven minutes, in which the machine idles
    python -m benchmarks.tray_idle --write    also writes benchmarks/results/tray-idle.json and docs/limits.md

A real tray shows its icon in the panel of a small desktop (X server, session bus, window manager, panel) and
senses it, and a real worker answers it. The person has agreed, and then leaves: after five minutes the worker
begins to serve tiny-chat. The worker, which the tray has started, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from swarmkit.bench.environment import environment
from swarmkit.sizes import format_bytes
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.places import HOME_VARIABLE, WorkerPlaces
from swarmkit.worker.settings import WorkerSettings, changed, save_settings
from tests.app.tray.desktop import seen_desktop, why_not
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tray-idle.json"
PAGE = ROOT / "docs" / "limits.md"
LINE = "<!-- the line below is written by `python -m benchmarks.tray_idle --write` -->\n"
MOST_CPU_SHARE, MOST_BYTES = 0.001, 80 * 2**20
SETTLE_S = 20.0
LOOK_S = 10.0


def measured(seconds: float) -> dict[str, object]:
    """Run a tray for so many seconds after it has settled."""
    with tempfile.TemporaryDirectory() as folder, seen_desktop(Path(folder)) as desktop:
        places = WorkerPlaces.inside(Path(folder))
        places.make()
        chosen = {"agreed": True, "serve": {"model": "tiny-chat"}, "rules": {"on_battery": True}}
        save_settings(places.settings, changed(WorkerSettings(), chosen))
        tray = subprocess.Popen(
            [sys.executable, "-m", "swarmkit.cli", "tray", "--link", "--host", "status-notifier"],
            env={**desktop.environment, HOME_VARIABLE: folder},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        client = WorkerClient(places)
        try:
            wait_until(lambda: client.runs and client.status().lease, "the tray has a lease", every=0.5)
            desktop.wait_for_icon("paused")
            time.sleep(SETTLE_S)
            return _watched(tray.pid, client, seconds)
        finally:
            tray.terminate()
            tray.wait(90)


def _watched(pid: int, client: WorkerClient, seconds: float) -> dict[str, object]:
    process = psutil.Process(pid)
    began, before, states, most = time.monotonic(), _own_cpu_s(process), set(), 0
    while time.monotonic() - began < seconds:
        time.sleep(LOOK_S)
        most = max(most, process.memory_info().rss)
        states.add(client.status().state)
    passed = time.monotonic() - began
    used = _own_cpu_s(process) - before
    memory = process.memory_full_info()
    return {
        "seconds": round(passed, 1),
        "cpu_s": round(used, 3),
        "cpu_share_of_one_core": round(used / passed, 6),
        "most_rss_bytes": most,
        "pss_bytes": memory.pss,
        "threads": process.num_threads(),
        "states_seen": sorted(states),
    }


def _line(result: dict[str, object], date: str) -> str:
    share, seconds = float(str(result["cpu_share_of_one_core"])), float(str(result["seconds"]))
    memory = format_bytes(int(str(result["most_rss_bytes"])))
    over = f"{seconds / 60:.0f} minutes"
    return f"Measured on {date[:10]} over {over}: {share:.3%} of one core, {memory} of memory."


def _own_cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> int:
    """Measure, and show it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the result")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to watch")
    options = parser.parse_args()
    if missing := why_not():
        raise SystemExit(f"a desktop cannot be had here: {missing}")
    result = measured(options.seconds)
    command = "python -m benchmarks.tray_idle --write"
    written = {**environment(), "command": command, "limits": [MOST_CPU_SHARE, MOST_BYTES], **result}
    print(json.dumps(result, indent=1))
    if options.write:
        RESULTS.write_text(json.dumps(written, indent=1) + "\n")
        head, mark, rest = PAGE.read_text().partition(LINE)
        _, _, tail = rest.partition("\n")
        PAGE.write_text(f"{head}{mark}{_line(result, str(written['date']))}\n{tail}")
    share, memory = float(str(result["cpu_share_of_one_core"])), int(str(result["most_rss_bytes"]))
    return 0 if share < MOST_CPU_SHARE and memory < MOST_BYTES else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
