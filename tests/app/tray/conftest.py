"""A worker in this process, and a real tray that finds it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("PIL")

from swarmkit.worker.places import WorkerPlaces
from tests.worker.worlds import RunningWorker, SaidMachine

StartTray = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def places(tmp_path: Path) -> WorkerPlaces:
    return WorkerPlaces.inside(tmp_path)


@pytest.fixture
def worker(places: WorkerPlaces) -> Iterator[RunningWorker]:
    running = RunningWorker(places, SaidMachine())
    yield running
    running.close()


@pytest.fixture
def start_tray(tmp_path: Path) -> Iterator[StartTray]:
    """Start a tray as a process, which says addresses instead of opening a browser."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **variables: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
        environment |= {"SWARMKIT_WORKER_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "xdg")}
        tray = subprocess.Popen(
            [sys.executable, "-m", "swarmkit.cli", "tray", "--link", *options],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(tray)
        return tray

    yield start
    for tray in started:
        if tray.poll() is None:
            tray.send_signal(signal.SIGTERM)
        try:
            tray.wait(60)
        finally:
            if tray.poll() is None:
                tray.kill()
                tray.wait(10)
            assert tray.stdout is not None
            tray.stdout.close()
