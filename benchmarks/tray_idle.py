"""What does the tray cost while nothing happens?

    python -m benchmarks.tray_idle            prints it; takes eleven minutes, in which the machine idles
    python -m benchmarks.tray_idle --write    also writes benchmarks/results/tray-idle.json and docs/limits.md

Two real trays, each with an icon in the panel of a small desktop (X server, window manager, panel, session
bus, and a system bus on which logind answers), sense their desktops, and a real worker answers each. The
people have agreed, and have gone. The one worker waits for an absence of an hour, and is paused; the other
one serves tiny-chat. The workers, which the trays have started, are not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil

from swarmkit.bench.environment import environment
from swarmkit.sizes import format_bytes
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.places import HOME_VARIABLE, WorkerPlaces
from swarmkit.worker.settings import WorkerSettings, changed, save_settings
from tests.app.tray.desktop import seen_desktop, why_not
from tests.waiting import wait_until
from tests.worker.desktops import SaidDesktop, message_bus

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tray-idle.json"
PAGE = ROOT / "docs" / "limits.md"
LINE = "<!-- the line below is written by `python -m benchmarks.tray_idle --write` -->\n"
MOST_CPU_SHARE, MOST_BYTES = 0.001, 80 * 2**20
SETTLE_S = 20.0
LOOK_S = 10.0


AWAY_AFTER_S = {"paused": 3600.0, "serving": 1.0}


def measured(situation: str, seconds: float) -> dict[str, object]:
    """Run a tray for so many seconds after its worker is in a situation, and has settled."""
    with ExitStack() as owned:
        folder = owned.enter_context(tempfile.TemporaryDirectory())
        desktop = owned.enter_context(seen_desktop(Path(folder)))
        system_bus = owned.enter_context(message_bus())
        said = SaidDesktop(system_bus)
        owned.callback(said.close)
        said.say("login", LockedHint=False, Remote=False)
        places = WorkerPlaces.inside(Path(folder))
        places.make()
        rules = {
            "away_after_s": AWAY_AFTER_S[situation],
            "on_battery": True,
            # What else this computer does, and who is logged in, is not what is asked here.
            "busy_cpu": {"in_use": 1.0, "away": 1.0},
            "pause_for_remote_session": False,
        }
        chosen = {"agreed": True, "serve": {"model": "tiny-chat"}, "rules": rules}
        save_settings(places.settings, changed(WorkerSettings(), chosen))
        buses = {"DBUS_SYSTEM_BUS_ADDRESS": system_bus}
        tray = subprocess.Popen(
            [sys.executable, "-m", "swarmkit.cli", "tray", "--link", "--host", "status-notifier"],
            env={**desktop.environment, **buses, HOME_VARIABLE: folder},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        client = WorkerClient(places)
        try:
            wait_until(lambda: client.runs and client.status().lease, "the tray has a lease", every=0.5)
            wait_until(lambda: client.status().state == situation, f"it is {situation}", every=0.5)
            desktop.wait_for_icon("paused" if situation == "paused" else "serving")
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


def _line(results: dict[str, dict[str, object]], date: str) -> str:
    seconds = min(float(str(result["seconds"])) for result in results.values())
    words = [
        f"{float(str(result['cpu_share_of_one_core'])):.3%} of one core and "
        f"{format_bytes(int(str(result['most_rss_bytes'])))} of memory while the worker is {situation}"
        for situation, result in results.items()
    ]
    return f"Measured on {date[:10]} over {seconds / 60:.0f} minutes: {'; '.join(words)}."


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
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as processes:
        asked = {name: processes.submit(measured, name, options.seconds) for name in AWAY_AFTER_S}
        results = {name: future.result() for name, future in asked.items()}
    print(json.dumps(results, indent=1))
    if options.write:
        command = "python -m benchmarks.tray_idle --write"
        limits = {"cpu_share_of_one_core": MOST_CPU_SHARE, "most_rss_bytes": MOST_BYTES}
        written = {**environment(), "command": command, "limits": limits, "results": results}
        RESULTS.write_text(json.dumps(written, indent=1) + "\n")
        head, mark, rest = PAGE.read_text().partition(LINE)
        _, _, tail = rest.partition("\n")
        PAGE.write_text(f"{head}{mark}{_line(results, str(written['date']))}\n{tail}")
    return 0 if all(_is_kept(result) for result in results.values()) else 1


def _is_kept(result: dict[str, object]) -> bool:
    share, memory = float(str(result["cpu_share_of_one_core"])), int(str(result["most_rss_bytes"]))
    return share < MOST_CPU_SHARE and memory < MOST_BYTES


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
