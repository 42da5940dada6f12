"""Installers that were built from this tree, and persons who install them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytest.importorskip("PIL")

from installer import build
from tools.check_wheel import build as build_wheel

HEAVY = ("torch", "hivemind", "transformers", "accelerate")
"""Gigabytes that neither tray nor worker imports. Everything else is installed from the package index."""


@dataclass
class Installers:
    """What was built from this tree, twice: the second is an upgrade of the first."""

    debs: tuple[Path, Path]
    folders: tuple[Path, Path]
    """Of the unpacked archives for Linux."""


@pytest.fixture(scope="session")
def installers(tmp_path_factory: pytest.TempPathFactory) -> Installers:
    folder = tmp_path_factory.mktemp("installers")
    first = build_wheel(folder / "wheel")
    second = folder / "upgrade" / first.name
    second.parent.mkdir()
    # A comment at the end of the archive makes another file of it, with the same content.
    second.write_bytes(first.read_bytes()[:-2] + b"\x01\x00+")
    debs, folders = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEBFULLNAME", "Ada Lovelace")
        patch.setenv("DEBEMAIL", "ada@analytical.engineering")
        for wheel, version in ((first, "0.1.0"), (second, "0.1.1")):
            patch.setattr(build, "__version__", version)
            out = folder / version
            out.mkdir()
            debs.append(build.deb(wheel, out))
            with tarfile.open(build.tarball(wheel, out)) as archive:
                archive.extractall(out, filter="tar")
            folders.append(out / f"swarmkit-{version}-linux")
    return Installers((debs[0], debs[1]), (folders[0], folders[1]))


@pytest.fixture(scope="session")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with uv's program, from the package index."""
    folder = tmp_path_factory.mktemp("uv")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, "uv"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"uv cannot be installed from a package index here: {done.stderr[-200:]}")
    return folder / "bin"


@pytest.fixture(scope="session")
def uv_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one person has downloaded, the others of this run do not download again."""
    return tmp_path_factory.mktemp("uv-cache")


class Person:
    """Somebody with a home of their own, in which there is something already."""

    def __init__(self, home: Path, variables: dict[str, str]) -> None:
        self.home = home
        self._as: dict[str, int] = {}
        self.launcher = home / ".local" / "bin" / "swarmkit"
        own = home / ".config" / "mine"
        own.parent.mkdir(parents=True)
        own.write_text("mine")
        run_time = home / "run"
        run_time.mkdir(mode=0o700)
        self.variables = {"HOME": str(home), "PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(run_time)}
        self.variables |= variables
        self._started: list[subprocess.Popen[bytes]] = []

    def become(self, uid: int, uv: Path) -> None:
        """Be somebody else than root, who cannot read what the tests keep in root's folders."""
        self._as = {"user": uid, "group": uid}
        shutil.copytree(uv, self.home / "bin", copy_function=shutil.copy)
        self.variables |= {"PATH": f"{self.home}/bin:/usr/bin:/bin", "UV_CACHE_DIR": f"{self.home}/uv-cache"}
        self.home.parent.chmod(0o755)
        for path in (self.home, *self.home.rglob("*")):
            os.chown(path, uid, uid)

    def run(self, *command: str | Path, ok: bool = True) -> str:
        """Run a command to its end; returns what it says."""
        done = subprocess.run(
            [*command],
            env=self.variables, cwd=self.home, text=True, timeout=170, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self._as,
        )  # fmt: skip
        assert (done.returncode == 0) == ok, done.stdout
        return done.stdout

    def start(self, *command: str | Path) -> None:
        """Start a command that goes on."""
        quiet = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
        process = subprocess.Popen([*command], env=self.variables, cwd=self.home, **quiet, **self._as)
        self._started.append(process)

    def traces(self) -> set[str]:
        """All files in the home, and the folders that are swarmkit's, by relative path."""
        found = (path for path in self.home.rglob("*") if not path.is_dir() or "swarmkit" in path.name)
        names = {str(path.relative_to(self.home)) for path in found}
        return {name for name in names if not name.startswith("uv-cache")}

    def processes(self) -> list[str]:
        """Commands that run from this home."""
        return [" ".join(process.info["cmdline"]) for process in self._running()]

    def close(self) -> None:
        """End what was started, in case a test has failed."""
        for process in self._running():
            process.kill()
        for started in self._started:
            started.wait(10)

    def _running(self) -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [process for process in found if str(self.home) in (process.info["cmdline"] or [""])[0]]


@pytest.fixture
def person(uv: Path, uv_cache: Path) -> Iterator[Person]:
    with tempfile.TemporaryDirectory(prefix="swarmkit") as folder:
        home = Path(folder) / "home"
        without = home.parent / "without.txt"
        without.write_text("".join(f'{name} ; python_version < "3"\n' for name in HEAVY))
        passed = {
            name: value for name, value in os.environ.items() if name.startswith(("UV_", "PIP_", "SSL_"))
        }
        variables = {"UV_OVERRIDE": str(without), "UV_CACHE_DIR": str(uv_cache)}
        someone = Person(home, {**passed, **variables})
        someone.variables["PATH"] = f"{uv}:/usr/bin:/bin"
        yield someone
        someone.close()


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test where programs are missing, and say which."""
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")
