"""What the worker promises to whoever lends a computer, each with the program and the commands that they use.

The rest of the tests say how it is done; these say that it holds where a person would see it.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from swarmkit import SwarmModelForCausalLM
from swarmkit.errors import SwarmkitError
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.values import Status
from swarmkit.worker.places import HOME_VARIABLE, WorkerPlaces
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.signals import SessionSignals
from tests.sessions import grouped_by_sessions, session_nice
from tests.waiting import wait_until
from tests.worker.worlds import AWAY, HERE

pytestmark = pytest.mark.slow

PROMPT = torch.arange(5, 25)[None]
GIB = 2**30
LIMITS = {
    "cpu_cores": {"in_use": 1, "away": 1},
    "ram_bytes": {"in_use": GIB, "away": GIB},
    "disk_free_bytes": {"in_use": 0, "away": 0},
    "temperature_c": {"in_use": 110.0, "away": 110.0},
}
QUIET_RULES = {
    # This machine may be busy with other tests; what is promised here does not depend on that.
    "busy_cpu": {"in_use": 1.0, "away": 1.0},
    "on_battery": True,
    "on_metered": True,
    "pause_for_remote_session": False,
}


SMALL_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


class Trap:
    """Writes a file as soon as it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path(self._path), "here")


class Person:
    """Somebody who has the program, its commands, and a desktop that tells whether they are there."""

    def __init__(self, home: Path) -> None:
        self.places = WorkerPlaces.inside(home)
        self.client = WorkerClient(self.places)
        own = {"HOME": str(home), HOME_VARIABLE: str(home), "SWARMKIT_STORE_DIR": str(home / "store")}
        folders = {name: str(home / name.lower()) for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME")}
        self.environment = {**os.environ, **own, **folders}
        self._signals: SessionSignals = AWAY
        self._gone = threading.Event()
        self.program: subprocess.Popen[bytes] | None = None

    def swarmkit(self, *words: str) -> str:
        """What a command says."""
        command = [sys.executable, "-m", "swarmkit.cli", *words]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=150, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def running(self) -> Iterator[None]:
        self.program = subprocess.Popen(
            [sys.executable, "-m", "swarmkit.cli", "worker", "run"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        desktop = threading.Thread(target=self._tell)
        try:
            wait_until(lambda: self.client.runs, "the worker answers", every=0.1)
            desktop.start()
            yield
        finally:
            self._gone.set()
            if desktop.ident is not None:
                desktop.join()
            self.program.terminate()
            self.program.wait(60)

    def is_seen(self, signals: SessionSignals) -> None:
        """From now on the desktop tells this."""
        self._signals = signals
        self.client.renew_lease("desktop", signals)

    def serve(self, **changes: Any) -> Status:
        """Agree, and wait until clients can use it."""
        agreed = {"agreed": True, "serve": {"model": "tiny-chat"}, "rules": QUIET_RULES, "limits": LIMITS}
        self.client.change_settings({**agreed, **changes})
        return self.wait_for("serving", "working")

    def wait_for(self, *states: str) -> Status:
        wait_until(lambda: self.client.status().state in states, f"it is {states}", every=0.1, within=150)
        return self.client.status()

    def _tell(self) -> None:
        while not self._gone.wait(1.5):
            with suppress(SwarmkitError):  # it is just being ended
                self.client.renew_lease("desktop", self._signals)


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    person = Person(tmp_path)
    with person.running():
        yield person


def node_of(status: Status) -> psutil.Process:
    assert status.node is not None
    return psutil.Process(status.node.pid)


@contextmanager
def load_on(status: Status) -> Iterator[None]:
    """A client that keeps it as busy as it can."""
    assert status.node is not None
    ended = threading.Event()
    with SwarmModelForCausalLM.from_pretrained("tiny-chat", initial_peers=status.node.addresses) as model:
        blocks = model.blocks[0 : model.config.num_hidden_layers]
        hidden = torch.randn(1, 256, model.config.hidden_size)

        def ask() -> None:
            with torch.no_grad():
                while not ended.is_set():
                    blocks(hidden)

        client = threading.Thread(target=ask)
        client.start()
        try:
            yield
        finally:
            ended.set()
            client.join()


def test_1_i_am_only_a_guest(person: Person) -> None:
    """Everything else comes first, and when the person is back it has gone."""
    person.is_seen(AWAY)
    node = node_of(person.serve())
    processes = [node, *node.children(recursive=True)]
    assert {process.nice() for process in processes} == {15}
    assert Path(f"/proc/{node.pid}/oom_score_adj").read_text().strip() == "1000"
    person.is_seen(HERE)
    assert person.wait_for("paused").reason == "in_use"
    assert not any(process.is_running() for process in processes)


@grouped_by_sessions
def test_1_a_session_of_my_own_gets_me_no_more_of_the_processors(person: Person) -> None:
    person.is_seen(AWAY)
    node = node_of(person.serve())
    assert session_nice(node.pid).split()[-2:] == ["nice", "15"]


def test_2_one_click_stops_me_and_i_say_when_i_come_back(person: Person) -> None:
    person.is_seen(AWAY)
    pids = used_by(node_of(person.serve()).pid).pids
    began = time.time()
    person.swarmkit("worker", "pause", "--until", "1h")
    status = person.wait_for("paused")
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert status.until == pytest.approx(began + 3600, abs=60)
    ends = time.strftime("%H:%M", time.localtime(status.until))
    assert f"until {ends}" in person.swarmkit("worker", "status")


def test_3_i_say_why(person: Person) -> None:
    """Whatever keeps it from serving is the first line of what it says."""
    said = [person.client.status().words]
    change: Callable[[dict[str, Any]], object] = person.client.change_settings
    person.is_seen(AWAY)
    change({"agreed": True, "rules": QUIET_RULES, "limits": LIMITS})
    said.append(person.wait_for("paused").words)
    change({"serve": {"model": "tiny-chat"}, "rules": {"schedule": dict.fromkeys(_DAYS, "." * 24)}})
    said.append(person.wait_for("paused").words)
    change(
        {"rules": {"schedule": dict.fromkeys(_DAYS, "#" * 24)}, "limits": {"disk_free_bytes": _both(2**59)}}
    )
    wait_until(lambda: person.client.status().reason == "disk", "the disk is looked at", every=0.1)
    said.append(person.client.status().words)
    person.is_seen(HERE)
    said.append(person.client.status().words)
    assert said[0] == "Paused: you have not chosen yet to lend this computer"
    assert said[1] == "Paused: no model has been chosen yet"
    assert said[2] == "Paused: your schedule has no hours to serve"
    assert said[3].endswith("of the disk are free")
    assert said[4] == "Paused: you use the computer (0 of 5 min)"
    assert person.swarmkit("worker", "status").startswith(said[4])


def test_4_i_never_use_more_than_you_allow(person: Person) -> None:
    """Under load; `benchmarks/worker_limits.py` measures every limit."""
    upload, late_s = 500_000.0, 3.0  # what was sent before may be reported so late
    person.is_seen(AWAY)
    status = person.serve(limits={**LIMITS, "upload_bytes_per_s": _both(upload)})
    pid = node_of(status).pid
    with load_on(status):
        time.sleep(2.0)
        began = time.monotonic()
        before, sent_before = used_by(pid).cpu_s, person.client.status().all.sent_bytes
        memory = 0
        for _ in range(50):
            memory = max(memory, used_by(pid).ram_bytes)
            time.sleep(0.1)
        computed_s, sent = used_by(pid).cpu_s - before, person.client.status().all.sent_bytes - sent_before
        passed = time.monotonic() - began
    assert computed_s <= 1.05 * passed
    assert memory <= GIB
    assert sent <= upload * (passed + late_s)


def test_5_what_runs_is_boxed_in(person: Person, tmp_path: Path) -> None:
    """It listens to this computer alone unless it is told otherwise, writes into its own folders only, and
    loads no model that could run code.
    """
    person.is_seen(AWAY)
    status = person.serve()
    node = node_of(status)
    processes = [node, *node.children(recursive=True), psutil.Process(status.pid)]
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"}
    written = [
        file.path for process in processes for file in process.open_files() if file.mode not in ("r", "")
    ]
    own = (str(tmp_path), "/tmp/", "/dev/", "/proc/")
    assert [path for path in written if not path.startswith(own)] == []

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(SMALL_LLAMA))
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(str(tmp_path / "code-of-others-ran"))))
    person.client.change_settings({"serve": {"model": str(pickled)}})
    assert "could run code" in person.wait_for("trouble").words
    assert not (tmp_path / "code-of-others-ran").exists()


def test_6_i_start_paused_and_explain(person: Person) -> None:
    person.is_seen(AWAY)
    status = person.client.status()
    time.sleep(3.0)
    assert (status.state, status.node, person.client.status().node) == ("paused", None, None)
    assert status.words == "Paused: you have not chosen yet to lend this computer"
    assert psutil.Process(status.pid).children(recursive=True) == []


def test_7_i_remove_myself_cleanly(person: Person, tmp_path: Path) -> None:
    person.is_seen(AWAY)
    pids = used_by(person.serve().pid).pids
    assert person.program is not None
    shell = threading.Thread(target=person.program.wait)  # takes note of its end, as a terminal does
    shell.start()
    person.swarmkit("uninstall", "--yes")
    shell.join(60)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []


_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def _both(value: float) -> dict[str, float]:
    return {"in_use": value, "away": value}
