"""Is each limit of the worker kept, and how soon does it get out of the way?

    python benchmarks/worker_limits.py            prints the table
    python benchmarks/worker_limits.py --write    also writes the results and docs/limits.md

It takes about twelve minutes. A worker serves tiny-chat on this machine, a client keeps it as busy as it can,
and one limit after the other is set. What is measured is the whole tree of the node's processes, from
outside.

The worker is the one of `swarmkit worker run`, and senses this machine. What cannot be had on a test machine
(a battery, a metered line, another program on a GPU) it reads from a file in the place of its own senses, and
what a tray would tell it is told by this program: these rows say "told".
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from swarmkit import SwarmModelForCausalLM
from swarmkit.bench.environment import environment
from swarmkit.sizes import format_bytes, format_data
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.handle import NoWorkerError
from swarmkit.worker.control.values import Status
from swarmkit.worker.governor import Governor
from swarmkit.worker.main import run_worker
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.policy import allowed
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.sensing.machine import OwnMachine, SensingOrder
from swarmkit.worker.sensing.nvidia import gpus
from swarmkit.worker.sensing.probes import UnknownError
from swarmkit.worker.settings import DAYS, WorkerLimits
from swarmkit.worker.signals import GpuSignals, MachineSignals, SessionSignals
from swarmkit.worker.worker import LEASE_S
from tests.models.hub import LocalHub, local_hub
from tests.models.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "worker-limits.json"
PAGE = ROOT / "docs" / "limits.md"
TABLE = "<!-- the table below is written by `python benchmarks/worker_limits.py --write` -->\n"

WATCH_S = 6.0
MOST_OTHERS_CPU = 1.0
COMPUTE_ENDS_S, MEMORY_ENDS_S = 1.0, 3.0
SENSED_WITHIN_S = 2.5
"""The worker looks at its machine every two seconds."""
ROWS, TOKENS = 1, 512
"""Of a request of the load; its hidden states travel both ways."""
AWAY = SessionSignals(idle_s=3600.0, locked=False, full_screen="", film="", remote_session=False)
AWAY_AFTER_S = 10.0
MODELS = ("random/one", "random/two")
"""On a hub on this machine, for which the disk has a limit."""


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    limit: str
    set_to: str
    measured: str
    kept: bool
    without: str = ""
    """The same without the limit."""


@dataclass(frozen=True)
class Unmeasured:
    """A row that this machine cannot fill, and why."""

    limit: str
    why: str


class ToldMachine:
    """This machine, but for what a file says."""

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


class Bench:
    """A worker, and a client that keeps it busy."""

    def __init__(self, home: Path) -> None:
        self.client = WorkerClient(WorkerPlaces.inside(home))
        self._told = home / "told.json"
        self._home = home
        self._stop = threading.Event()
        self._environment = {**os.environ, "SWARMKIT_WORKER_HOME": str(home), "HF_HOME": str(home / "hf")}

    @contextlib.contextmanager
    def running(self, hub: LocalHub) -> Iterator[None]:
        self._environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, __file__, "--worker", str(self._told)]
        worker = subprocess.Popen(command, env=self._environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: self.client.runs, "the worker answers")
            rules = {
                "presence": "headless",
                "on_battery": True,
                "on_metered": True,
                "busy_cpu": {"in_use": MOST_OTHERS_CPU, "away": MOST_OTHERS_CPU},
            }
            self.client.change_settings(
                {"agreed": True, "serve": {"model": "tiny-chat"}, "rules": rules, "limits": limits()}
            )
            self.wait("serving")
            yield
        finally:
            worker.terminate()
            worker.wait(60)

    def tell(self, **signals: object) -> None:
        """Have the worker sense these, in the place of its machine's."""
        told = self._told.with_suffix(".new")
        told.write_bytes(msgspec.json.encode(signals))
        told.replace(self._told)

    def renew(self, **changed: float | None) -> None:
        """Set limits with which another node process has to begin, and wait until that one serves."""
        self.begin_anew(lambda: self.set(**changed))

    def serve(self, model: str) -> None:
        """Have another model served."""
        self.begin_anew(lambda: self.client.change_settings({"serve": {"model": model}}))

    def begin_anew(self, change: Callable[[], object]) -> None:
        """Change something with which another node process has to begin, and wait until that one serves."""
        before = self.pid()
        change()
        wait_for(lambda: (n := self.client.status().node) and n.pid != before, "another node begins")
        self.wait("serving")

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

    @property
    def folder(self) -> Path:
        return self._home

    @property
    def weights(self) -> Path:
        return WorkerPlaces.inside(self._home).weights

    @functools.cached_property
    def models(self) -> list[Path]:
        """Random models of one size, one for each of `MODELS`."""
        size = {"hidden_size": 512, "intermediate_size": 1024}
        return [make_checkpoint(self._home, "llama", seed=seed, **size) for seed in range(len(MODELS))]

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
    return Measured("share of computing time", "0.25", f"{part:.2f} of the processor time", part <= 0.3, "1")


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
    bench.set()
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
    bench.set()
    peaks = {}
    for limit in (most, None):
        with _Watched(lambda: _size(bench.weights)) as watched:
            bench.renew(disk_bytes=limit or 20 * most)
            for model in MODELS:
                bench.serve(model)
        peaks[limit] = watched.most
        bench.serve("tiny-chat")
    return Measured(
        "disk for weights",
        f"{format_data(most)}, and two models of {format_data(size)}",
        f"{format_data(peaks[most])} at most",
        peaks[most] <= most,
        format_data(peaks[None]),
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
    """Bytes of all weights in a folder."""
    found = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it goes while this looks
            found += file.stat().st_size if file.suffix in (".safetensors", ".part") else 0
    return found


def pause(bench: Bench, haste: str) -> Measured:
    bench.set()
    bench.wait("serving", "working")
    with bench.load():
        ended = _end(bench, lambda: bench.client.pause(haste=haste))  # type: ignore[arg-type]
    bench.client.resume()
    bench.wait("serving", "working")
    set_to = f"no computing after {COMPUTE_ENDS_S:g} s, memory back after {MEMORY_ENDS_S:g} s"
    return Measured(f"a pause under load (`{haste}`)", set_to, str(ended), ended.is_in_time(0.0))


@dataclass(frozen=True)
class _End:
    """How soon a node ended."""

    computed_s: float
    """Until it had computed for the last time."""
    gone_s: float
    """Until its last process had gone, and with it all its memory."""

    def is_in_time(self, sensed_s: float) -> bool:
        return self.computed_s <= COMPUTE_ENDS_S + sensed_s and self.gone_s <= MEMORY_ENDS_S + sensed_s

    def __str__(self) -> str:
        return f"computed for {self.computed_s:.2f} s more, all memory back after {self.gone_s:.2f} s"


def _end(bench: Bench, act: Callable[[], object]) -> _End:
    pids = used_by(bench.pid()).pids
    began = time.monotonic()
    computed_s, before = 0.0, _cpu_s(pids)
    act()
    while (now := _cpu_s(pids)) is not None:
        passed = time.monotonic() - began
        if before is None or now > before:
            computed_s, before = passed, now
        if passed > 60:
            raise SystemExit("did not come about: the node has ended")
        time.sleep(0.01)
    return _End(computed_s, time.monotonic() - began)


def _cpu_s(pids: frozenset[int]) -> float | None:
    """Processor time of those of some processes that are left; None if none is."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                times = process.cpu_times()
                found.append(times.user + times.system)
    return sum(found) if found else None


def rule(
    bench: Bench,
    name: str,
    reason: str,
    begin: Callable[[], object],
    end: Callable[[], object],
    sensed_s: float = 0.0,
) -> Measured:
    """Have something happen at which the worker pauses, under load, and end again."""
    bench.set()
    bench.wait("serving", "working")
    with bench.load():
        ended = _end(bench, begin)
    status = bench.client.status()
    end()
    bench.wait("serving", "working")
    said = status.words if status.reason == reason else f"**{status.words}**"
    kept = status.reason == reason and ended.is_in_time(sensed_s)
    return Measured(
        name, f"pause; sensed within {sensed_s:g} s" if sensed_s else "pause", f"{ended}; {said!r}", kept
    )


def rules(bench: Bench) -> Iterator[Measured]:
    """All rules that the worker itself senses, or reads from its settings."""
    change = bench.client.change_settings
    sensed = {"sensed_s": SENSED_WITHIN_S}

    def programs(*names: str) -> object:
        return change({"rules": {"programs": list(names)}})

    on_battery = change({"rules": {"on_battery": False, "on_metered": False}})
    assert on_battery.rules.on_battery is False
    yield rule(bench, "battery (told)", "battery", lambda: bench.tell(on_battery=True), bench.tell, **sensed)
    yield rule(
        bench, "metered line (told)", "metered", lambda: bench.tell(metered=True), bench.tell, **sensed
    )
    gpu = {"other_programs": ["blender"]}
    yield rule(
        bench,
        "another program on the GPU (told)",
        "gpu_program",
        lambda: bench.tell(gpu=gpu),
        bench.tell,
        **sensed,
    )
    busy = {"other_load": 0.9}
    yield rule(
        bench, "others on the GPU for 90 % of the time (told)", "busy_gpu",
        lambda: bench.tell(gpu=busy), bench.tell, **sensed,
    )  # fmt: skip
    yield rule(
        bench, "a device of 120 °C (told; limit 110 °C)", "too_hot",
        lambda: bench.tell(temperature_c=120.0), lambda: bench.tell(temperature_c=40.0), **sensed,
    )  # fmt: skip
    bench.tell()
    with _game(bench) as (start, stop):
        programs("swarmkit-game")
        yield rule(bench, "a listed program", "program", start, stop, **sensed)
    programs()
    change({"rules": {"busy_cpu": {"in_use": 0.8, "away": 0.8}}})  # the client is another program too
    with _busy() as (start, stop):
        yield rule(
            bench, "busy processors (limit 80 %)", "busy_cpu", start, stop, sensed_s=2 * SENSED_WITHIN_S
        )
    change({"rules": {"busy_cpu": {"in_use": MOST_OTHERS_CPU, "away": MOST_OTHERS_CPU}}})
    closed, open_ = dict.fromkeys(DAYS, "." * 24), dict.fromkeys(DAYS, "#" * 24)
    change({"drain_s": 0.5})  # sessions may move away for so long, where nothing is urgent
    yield rule(
        bench, "schedule (no hours)", "schedule", lambda: change({"rules": {"schedule": closed}}),
        lambda: change({"rules": {"schedule": open_}}),
    )  # fmt: skip
    change({"drain_s": 30.0})
    full = {"disk_free_bytes": {"in_use": 2**59, "away": 2**59}}
    yield rule(
        bench, "free disk (more than there is)", "disk", lambda: change({"limits": full}), bench.set, **sensed
    )


def rules_of_the_session(bench: Bench) -> Iterator[Measured]:
    """What a tray tells: this program holds its lease."""
    with _Lease(bench.client, AWAY) as lease:
        bench.client.change_settings({"rules": {"presence": "desktop"}})
        for name, reason, signals in (
            ("somebody comes back (told)", "in_use", {"idle_s": 0.0}),
            ("a program fills the screen (told)", "full_screen", {"full_screen": "doom"}),
            ("a film plays (told)", "film", {"film": "VLC media player"}),
            ("somebody logs in from afar (told)", "remote_session", {"remote_session": True}),
        ):
            told = msgspec.structs.replace(AWAY, **signals)
            yield rule(bench, name, reason, functools.partial(lease.tell, told), lambda: lease.tell(AWAY))
        yield absence(bench, lease)
        yield in_use_or_away(bench, lease)
        yield rule(bench, "the tray is killed", "no_tray", lease.lose, lease.find, sensed_s=LEASE_S)
        bench.client.change_settings({"rules": {"presence": "headless"}})


def absence(bench: Bench, lease: _Lease) -> Measured:
    """Somebody goes away; for how long nobody has touched anything when it begins to serve."""
    bench.set()
    bench.client.change_settings({"rules": {"away_after_s": AWAY_AFTER_S}})
    idle_s = 0.0
    lease.tell(msgspec.structs.replace(AWAY, idle_s=idle_s))
    bench.wait("paused")
    began = time.monotonic()

    def begins() -> bool:
        nonlocal idle_s
        idle_s = time.monotonic() - began
        lease.tell(msgspec.structs.replace(AWAY, idle_s=idle_s))
        return bench.client.status().node is not None

    wait_for(begins, "it begins to serve")
    lease.tell(AWAY)
    bench.wait("serving")
    bench.client.change_settings({"rules": {"away_after_s": 300.0}})
    return Measured(
        "only after an absence (told)",
        f"{AWAY_AFTER_S:g} s",
        f"begins after {idle_s:.1f} s",
        idle_s >= AWAY_AFTER_S,
    )


def in_use_or_away(bench: Bench, lease: _Lease) -> Measured:
    """A limit has one value while somebody uses the computer, and another one while nobody does."""
    bench.set()
    cores = {"cpu_cores": {"in_use": 1, "away": None}}
    change = bench.client.change_settings
    # What the node plans its memory with changes as well, because it now goes on while somebody is here.
    bench.begin_anew(lambda: change({"rules": {"only_when_away": False}, "limits": cores}))
    with bench.load():
        away = bench.cores_used()
        lease.tell(msgspec.structs.replace(AWAY, idle_s=0.0))
        time.sleep(2)
        in_use = bench.cores_used()
    lease.tell(AWAY)
    bench.begin_anew(lambda: change({"rules": {"only_when_away": True}}))
    return Measured(
        "CPU cores while somebody is here (told), no limit else",
        "1",
        f"{in_use:.2f}",
        in_use <= 1.05,
        f"{away:.2f} while away",
    )


class _Lease:
    """Renews a tray's lease every second, inside `with`."""

    def __init__(self, client: WorkerClient, signals: SessionSignals) -> None:
        self._client, self._signals = client, signals
        self._held, self._ended = True, threading.Event()
        self._thread = threading.Thread(target=self._renew)

    def __enter__(self) -> _Lease:
        self.tell(self._signals)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._client.release_lease("bench")

    def tell(self, signals: SessionSignals) -> None:
        self._signals = signals
        self._client.renew_lease("bench", signals)

    def lose(self) -> None:
        self._held = False

    def find(self) -> None:
        self._held = True
        self.tell(self._signals)

    def _renew(self) -> None:
        while not self._ended.wait(1.0):
            if self._held:
                self._client.renew_lease("bench", self._signals)


Switch = tuple[Callable[[], object], Callable[[], object]]


@contextlib.contextmanager
def _game(bench: Bench) -> Iterator[Switch]:
    """A program with a name of its own, to start and to end."""
    game = bench.folder / "swarmkit-game"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", game)
    with _programs([str(game), "600"], 1) as switch:
        yield switch


@contextlib.contextmanager
def _busy() -> Iterator[Switch]:
    """Programs that compute on all processors."""
    with _programs([sys.executable, "-c", "while True: pass"], os.cpu_count() or 1) as switch:
        yield switch


@contextlib.contextmanager
def _programs(command: list[str], count: int) -> Iterator[Switch]:
    running: list[subprocess.Popen[bytes]] = []

    def stop() -> None:
        while running:
            program = running.pop()
            program.kill()
            program.wait()

    try:
        yield lambda: running.extend(subprocess.Popen(command) for _ in range(count)), stop
    finally:
        stop()


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


def unmeasured() -> list[Unmeasured]:
    """Rows that this machine cannot fill."""
    try:
        of_gpu = "this program serves on the processor only" if gpus() else "this machine has no GPU"
    except UnknownError:
        of_gpu = "this machine has no GPU"
    return [
        Unmeasured("a GPU's memory and watts", of_gpu),
    ]


def table(rows: list[Measured], left_out: Sequence[Unmeasured] = ()) -> str:
    lines = ["| limit | set to | measured | without it | kept |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row.limit} | {row.set_to} | {row.measured} | {row.without} | {'yes' if row.kept else '**no**'} |"
        for row in rows
    ]
    lines += [f"| {row.limit} | | not measured: {row.why} | | |" for row in left_out]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure all, and show it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        run_worker(sensing=ToldMachine(options.worker))
        return 0
    torch.set_num_threads(1)
    logging.getLogger("swarmkit").setLevel(logging.ERROR)  # the swarm ends under the client, again and again
    rows: list[Measured] = [temperature()]

    def note(row: Measured) -> None:
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)

    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        repos: dict[str, Path | None] = dict(zip(MODELS, bench.models, strict=True))
        with local_hub(repos) as hub, bench.running(hub):
            for measure in (cores, compute_share, upload, download, memory, disk, quota):
                note(measure(bench))
            for haste in ("prompt", "now"):
                note(pause(bench, haste))
            for row in itertools.chain(rules(bench), rules_of_the_session(bench)):
                note(row)
    left_out = unmeasured()
    print(table(rows, left_out))
    if options.write:
        result = {**environment(), "command": "python benchmarks/worker_limits.py --write"}
        result["rows"] = [asdict(row) for row in rows]
        result["not_measured"] = [asdict(row) for row in left_out]
        RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        head, mark, _ = PAGE.read_text().partition(TABLE)
        made = f"Measured on {result['date'][:10]} on {result['machine']['cores']} cores.\n\n"
        PAGE.write_text(f"{head}{mark}\n{made}{table(rows, left_out)}")
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
