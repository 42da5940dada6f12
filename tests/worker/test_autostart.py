"""The tray starts at log-in where the person chose so, by the system's own way, and by nothing else."""

from __future__ import annotations

import plistlib
import sys
from pathlib import Path

import pytest

from swarmkit.worker import autostart

LAUNCHER = "/home/me/.local/bin/swarmkit"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(autostart.LAUNCHER_VARIABLE, LAUNCHER)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_it_is_off_until_it_is_switched_on_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    seen = [autostart.is_on()]
    for on in (True, False):
        autostart.switch(on)
        seen.append(autostart.is_on())
    assert seen == [False, True, False]
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_a_launch_agent_starts_the_tray_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    autostart.switch(True)
    (path,) = (home / "Library" / "LaunchAgents").iterdir()
    agent = plistlib.loads(path.read_bytes())
    assert (agent["ProgramArguments"], agent["RunAtLoad"]) == ([LAUNCHER, "tray"], True)
    assert "KeepAlive" not in agent


def test_a_desktop_entry_starts_the_tray_by_its_launcher(home: Path) -> None:
    autostart.switch(True)
    (path,) = (home / ".config" / "autostart").iterdir()
    assert f'Exec="{LAUNCHER}" "tray"' in path.read_text().splitlines()
