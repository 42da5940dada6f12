"""What NVIDIA's driver tells of a GPU reaches the decision, and what the person allows reaches the driver.

The driver is a library of a few lines in C with the driver's name and functions, so that NVIDIA's own
bindings speak with it: there is no GPU here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.values import Status
from swarmkit.worker.places import HOME_VARIABLE, WorkerPlaces
from swarmkit.worker.settings import WorkerSettings, changed, save_settings
from tests.waiting import wait_until
from tests.worker.desktops import missing
from tests.worker.worlds import not_ours

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the driver is a library for Linux"),
    pytest.mark.skipif(bool(missing("cc")), reason=missing("cc")),
]


class PretendedGpu:
    """One GPU, whose driver tells what it was told."""

    def __init__(self, driver: Path, path: Path) -> None:
        self._path = path
        self.variables = {
            "LD_LIBRARY_PATH": f"{driver}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "PRETENDED_GPU": str(path),
        }
        self.say()

    def say(self, **numbers: int) -> None:
        """From now on it is so; what is not named is as on a GPU that nobody uses."""
        new = self._path.with_suffix(".new")
        new.write_text("".join(f"{name} {number}\n" for name, number in numbers.items()))
        new.replace(self._path)

    @property
    def watts(self) -> int | None:
        """The power limit that was set; None: none ever."""
        limit = self._path.with_name(f"{self._path.name}.limit")
        return int(limit.read_text() or 0) if limit.exists() else None


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("pretend_gpu.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


@pytest.fixture
def gpu(driver: Path, tmp_path: Path) -> PretendedGpu:
    return PretendedGpu(driver, tmp_path / "gpu")


@pytest.fixture
def client(gpu: PretendedGpu, tmp_path: Path) -> Iterator[WorkerClient]:
    """Of a worker, as a program, that works on the GPU; only its node process is pretended."""
    places = WorkerPlaces.inside(tmp_path / "home")
    places.make()
    chosen = {
        "agreed": True,
        "serve": {"model": "quick", "device": "cuda:0"},
        "rules": {"presence": "headless", "on_battery": True, "busy_cpu": {"in_use": 1, "away": 1}},
        "limits": {"disk_free_bytes": {"in_use": 0, "away": 0}, "gpu_watts": {"in_use": 150, "away": 200}},
    }
    save_settings(places.settings, changed(WorkerSettings(), chosen))
    code = (
        "from tests.worker.worlds import PRETEND_NODE; from swarmkit.worker.main import run_worker;"
        "run_worker(node_command=PRETEND_NODE)"
    )
    environment = {**os.environ, **gpu.variables, HOME_VARIABLE: str(tmp_path / "home")}
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    client = WorkerClient(places)
    try:
        wait_until(lambda: client.runs and client.status().state == "working", "it works", every=0.05)
        yield client
    finally:
        program.terminate()
        program.wait(60)


def becomes(client: WorkerClient, reason: str) -> Status:
    wait_until(lambda: client.status().reason == reason, f"the reason is {reason}", every=0.05)
    return client.status()


def test_another_program_on_the_gpu_pauses_it_and_is_named(client: WorkerClient, gpu: PretendedGpu) -> None:
    with not_ours("sleep", "600") as pid:
        gpu.say(other_pid=pid)
        assert becomes(client, "gpu_program").words == "Paused: sleep uses the GPU"
        gpu.say()
        becomes(client, "serving")


def test_its_own_work_on_the_gpu_is_not_that_of_others(client: WorkerClient, gpu: PretendedGpu) -> None:
    node = client.status().node
    assert node is not None
    gpu.say(own_pid=node.pid, own_load=90, load=95, watts=260)
    # It has looked at the GPU since then: it rests, as the power may not be that high.
    wait_until(lambda: (n := client.status().node) and n.compute_share < 1.0, "it has looked", every=0.05)
    assert client.status().reason == "serving"


def test_the_load_of_others_pauses_it(client: WorkerClient, gpu: PretendedGpu) -> None:
    node = client.status().node
    assert node is not None
    gpu.say(own_pid=node.pid, own_load=30, load=90)
    assert becomes(client, "busy_gpu").words == "Paused: other programs use 60% of the GPU"


def test_a_gpu_that_is_too_hot_pauses_it_until_it_has_cooled(client: WorkerClient, gpu: PretendedGpu) -> None:
    gpu.say(celsius=90)
    assert becomes(client, "too_hot").words == "Paused: the device has 90 °C, and cools down"
    gpu.say(celsius=72)
    wait_until(lambda: "72 °C" in client.status().words, "it has looked again", every=0.05)
    gpu.say(celsius=60)
    becomes(client, "serving")


def test_the_power_is_limited_while_it_works_and_as_it_was_afterwards(
    client: WorkerClient, gpu: PretendedGpu
) -> None:
    wait_until(lambda: gpu.watts == 200, "the limit for away is set", every=0.05)
    client.pause()
    wait_until(lambda: gpu.watts == 300, "the usual limit is back", every=0.05)


def test_where_the_power_may_not_be_set_it_rests_until_the_mean_is_right(
    client: WorkerClient, gpu: PretendedGpu
) -> None:
    gpu.say(administrators_only=1, watts=400)

    def share() -> float:
        node = client.status().node
        return node.compute_share if node else 1.0

    wait_until(lambda: share() <= 0.75, "it rests half of the time: √(200 ÷ 400) a look", every=0.05)
    assert client.status().reason == "serving"


def test_what_the_driver_does_not_tell_stops_nothing(client: WorkerClient, gpu: PretendedGpu) -> None:
    gpu.say(processes_unknown=1, load=100, watts=260)
    wait_until(lambda: (n := client.status().node) and n.compute_share < 1.0, "it has looked", every=0.05)
    assert client.status().reason == "serving"


def test_a_gpu_is_found_with_its_memory(gpu: PretendedGpu) -> None:
    code = "from swarmkit.worker.sensing.nvidia import gpus; print(*gpus())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **gpu.variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == f"Gpu(device='cuda:0', name='Pretended GPU', memory={8 * 2**30})"
