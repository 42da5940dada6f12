"""A worker that serves tiny-chat, and a client that keeps it busy: what `worker_limits.py` measures with."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from swarmkit import SwarmModelForCausalLM
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.handle import NoWorkerError
from swarmkit.worker.control.values import Status
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.settings import DAYS
from tests.models.hub import LocalHub
from tests.models.tiny import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("random/one", "random/two")
"""On a hub on this machine, for which the disk has a limit."""
WATCH_S = 6.0
COMPUTE_ENDS_S, MEMORY_ENDS_S = 1.0, 3.0
_ROWS, _TOKENS = 1, 512
"""Of a request of the load; its hidden states travel both ways."""
_OPEN: dict[str, float | None] = {
    "cpu_cores": None,
    "compute_share": 1.0,
    "ram_bytes": 8 * 2**30,
    "upload_bytes_per_s": None,
    "download_bytes_per_s": None,
    "month_bytes": None,
    "disk_bytes": 20 * 2**30,
    "disk_free_bytes": 0,
    "temperature_c": 110.0,
}
_RULES: dict[str, Any] = {
    "presence": "headless",
    "only_when_away": True,
    "away_after_s": 300.0,
    "on_battery": True,
    "on_metered": True,
    "programs": [],
    "busy_cpu": {"in_use": 1.0, "away": 1.0},
    "schedule": dict.fromkeys(DAYS, "#" * 24),
}


class DidNotComeError(Exception):
    """What a row waited for did not come about."""


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
class NodeEnd:
    """How soon a node ended.

    Attributes:
        computed_s: until it had computed for the last time.
        gone_s: until its last process had gone, and with it all its memory.
    """

    computed_s: float
    gone_s: float

    def is_in_time(self, sensed_s: float) -> bool:
        """Args: sensed_s: how long it may take until the worker senses what it pauses for."""
        return self.computed_s <= COMPUTE_ENDS_S + sensed_s and self.gone_s <= MEMORY_ENDS_S + sensed_s

    def __str__(self) -> str:
        return f"computed for {self.computed_s:.2f} s more, all memory back after {self.gone_s:.2f} s"


class Bench:
    """A worker, and a client that keeps it busy."""

    def __init__(self, home: Path) -> None:
        self.folder = home
        self.client = WorkerClient(WorkerPlaces.inside(home))
        self.weights = WorkerPlaces.inside(home).weights
        self._told = home / "told.json"
        self._stop = threading.Event()
        # Without a limit the node computes with as many threads as there are processors.
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self._environment = {**own, "SWARMKIT_WORKER_HOME": str(home), "HF_HOME": str(home / "hf")}

    @functools.cached_property
    def models(self) -> list[Path]:
        """Random models of one size, one for each of `MODELS`."""
        size = {"hidden_size": 512, "intermediate_size": 1024}
        return [make_checkpoint(self.folder, "llama", seed=seed, **size) for seed in range(len(MODELS))]

    @contextlib.contextmanager
    def running(self, hub: LocalHub) -> Iterator[None]:
        """Run the worker inside the `with` block."""
        self._environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "benchmarks.told_worker", str(self._told)]
        worker = subprocess.Popen(command, env=self._environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: self.client.runs, "the worker answers")
            yield
        finally:
            worker.terminate()
            worker.wait(120)

    # ------------------------------------------------------------------ what is set

    def as_usual(self) -> None:
        """Have it serve tiny-chat, with rules and limits that limit nothing; wait until it does."""
        self.tell()
        self.client.resume()
        usual = {"agreed": True, "serve": {"model": "tiny-chat"}, "drain_s": 30.0, "rules": _RULES}
        self.client.change_settings({**usual, "limits": limits()})
        time.sleep(1.0)  # where another node has to begin, this one ends
        self.wait("serving", "working")

    def tell(self, **signals: object) -> None:
        """Have the worker sense these, in the place of its machine's."""
        told = self._told.with_suffix(".new")
        told.write_bytes(msgspec.json.encode(signals))
        told.replace(self._told)

    def set(self, **changed: float | None) -> None:
        """Set some limits, and lift all others."""
        self.client.change_settings({"limits": limits(**changed)})

    def set_rules(self, **changed: object) -> None:
        """Change some rules."""
        self.client.change_settings({"rules": changed})

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

    # ------------------------------------------------------------------ what happens

    def wait(self, *states: str) -> Status:
        """Wait for one of some states of the worker."""
        wait_for(lambda: self.client.status().state in states, f"the worker is {' or '.join(states)}")
        return self.client.status()

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Keep the node busy with requests whose hidden states go there and back whole."""
        node = self.client.status().node
        assert node is not None
        self._stop.clear()
        with SwarmModelForCausalLM.from_pretrained("tiny-chat", initial_peers=node.addresses) as model:
            blocks = model.blocks[0 : model.config.num_hidden_layers]
            hidden = torch.randn(_ROWS, _TOKENS, model.config.hidden_size)
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
        """The node's process."""
        node = self.client.status().node
        if node is None:
            raise DidNotComeError("there is a node")
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

    def end(self, act: Callable[[], object]) -> NodeEnd:
        """Do something at which the node ends, and see how soon it does."""
        pids = used_by(self.pid()).pids
        began = time.monotonic()
        computed_s, before = 0.0, _cpu_s(pids)
        act()
        while (now := _cpu_s(pids)) is not None:
            passed = time.monotonic() - began
            if before is None or now > before:
                computed_s, before = passed, now
            if passed > 60:
                raise DidNotComeError("the node has ended")
            time.sleep(0.01)
        return NodeEnd(computed_s, time.monotonic() - began)


def limits(**changed: float | None) -> dict[str, Any]:
    """Settings in which some limits are set, and all others so high that they limit nothing."""
    values = {**_OPEN, **changed}
    return {name: {"in_use": value, "away": value} for name, value in values.items()}


def wait_for(holds: Callable[[], object], what: str, within_s: float = 120.0) -> float:
    """Wait until something holds; returns how long that took, in seconds.

    Raises:
        DidNotComeError: it did not within the time.
    """
    began = time.monotonic()
    while True:
        with contextlib.suppress(NoWorkerError):
            if holds():
                return time.monotonic() - began
        if time.monotonic() - began > within_s:
            raise DidNotComeError(what)
        time.sleep(0.01)


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
