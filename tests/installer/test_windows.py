"""The set-up for Windows compiles here. Wine stands in for Windows; there is no WSL2, and uv does not run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("PIL")

from installer import build
from tests.installer.conftest import Installers, needs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs("makensis", "wine")]
KEEPABLE = "AppData/Local/swarmkit/swarmkit/worker.json"
RUN = r"HKCU\Software\Microsoft\Windows\CurrentVersion\Run"
UNINSTALL = r"HKCU\Software\Microsoft\Windows\CurrentVersion\Uninstall\swarmkit"


@pytest.fixture(scope="module")
def setup(installers: Installers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (wheel,) = installers.folders[0].glob("*.whl")
    try:
        return build.windows(wheel, tmp_path_factory.mktemp("setup"), compressor="zlib")
    except build.SkippedError as error:
        pytest.skip(str(error))


class Windows:
    """A new Windows in a folder."""

    def __init__(self, folder: Path) -> None:
        quiet = {"WINEDEBUG": "-all", "WINEARCH": "win64", "WINEDLLOVERRIDES": "mscoree=;mshtml="}
        self._variables = {**os.environ, **quiet, "WINEPREFIX": str(folder), "DISPLAY": ""}
        self.run("wineboot", "-i")
        (self.home,) = (path for path in (folder / "drive_c/users").iterdir() if path.name != "Public")
        self.programs = self.home / "AppData/Local/Programs/swarmkit"

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            ["wine", *command], env=self._variables, capture_output=True, timeout=150, check=False
        )
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""

    def wait(self) -> None:
        """Until all programs have ended: a removal goes on in a copy of its program."""
        subprocess.run(["wineserver", "-w"], env=self._variables, timeout=150, check=True)

    def files(self) -> set[str]:
        """Of the person, without what Windows keeps for itself."""
        found = (path for path in self.home.rglob("*") if path.is_file())
        return {str(path.relative_to(self.home)) for path in found if "Temp" not in path.parts}


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windows]:
    here = Windows(tmp_path_factory.mktemp("wine"))
    yield here
    here.wait()


def test_it_is_installed_without_starting_by_itself_and_removed_without_a_trace(
    windows: Windows, setup: Path
) -> None:
    before = windows.files()
    windows.run(setup, "/S")
    windows.wait()
    names = {path.name for path in windows.programs.iterdir()}
    assert {"swarmkit.cmd", "install-worker.cmd", "uv.exe", "uninstall.exe"} <= names
    assert "swarmkit" in windows.run("reg", "query", UNINSTALL)
    assert "swarmkit-tray" not in windows.run("reg", "query", RUN)
    windows.run(windows.programs / "uninstall.exe", "/S")
    windows.wait()
    assert windows.files() == before
    assert not windows.programs.exists()
    assert windows.run("reg", "query", UNINSTALL) == ""


@pytest.mark.parametrize(("options", "kept"), [([], False), (["/KEEP"], True)])
def test_an_upgrade_keeps_settings_and_removal_does_as_it_is_told(
    windows: Windows, setup: Path, options: list[str], kept: bool
) -> None:
    windows.run(setup, "/S")
    windows.wait()
    settings = windows.home / KEEPABLE
    settings.parent.mkdir(parents=True)
    settings.write_text("{}")
    windows.run(setup, "/S")
    windows.wait()
    assert settings.exists()
    assert "swarmkit-tray" not in windows.run("reg", "query", RUN)
    windows.run(windows.programs / "uninstall.exe", "/S", *options)
    windows.wait()
    assert settings.exists() == kept
    assert not windows.programs.exists()
    settings.unlink(missing_ok=True)
    for folder in settings.parents[:2]:
        if folder.exists():
            folder.rmdir()
