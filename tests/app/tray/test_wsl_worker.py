"""A tray on Windows reaches the worker in WSL2. Here a shell with another home stands in for WSL2."""

from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path

import pytest
from swarmkit_app.tray import wsl_worker

from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.places import HOME_VARIABLE, WorkerPlaces
from tests.waiting import wait_until


@pytest.mark.slow
def test_the_worker_in_wsl2_answers_the_tray_and_ends_with_it(tmp_path: Path) -> None:
    launcher = tmp_path / "linux" / ".local" / "bin" / "swarmkit"
    launcher.parent.mkdir(parents=True)
    words = shlex.join([sys.executable, "-m", "swarmkit.cli"])
    launcher.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    launcher.chmod(0o755)
    linux = ["env", f"HOME={tmp_path / 'linux'}", f"{HOME_VARIABLE}={tmp_path / 'linux'}", "sh", "-c"]
    windows = WorkerPlaces.inside(tmp_path / "windows")
    codes: list[int] = []
    running = threading.Thread(target=lambda: codes.append(wsl_worker.run(windows, linux)))
    running.start()
    client = WorkerClient(windows)
    try:
        wait_until(lambda: client.runs, "the worker answers", every=0.1)
        assert client.status().reason == "not_agreed"
    finally:
        if client.runs:
            client.stop()
        running.join(30)
    assert codes == [0]
    assert not windows.handle.exists()
