"""Installation, upgrade and removal on Linux leave a person's home as they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.installer.conftest import Installers, Person, needs
from tests.waiting import wait_until

LINUX = Path(__file__).parents[2] / "installer" / "linux"
SCRIPTS = sorted([*LINUX.glob("*.sh"), *(LINUX / "debian").glob("p*rm"), *LINUX.parent.glob("macos/*.sh")])
EVERY_END = ["before it ever ran", "while it runs", "while it is paused", "after an upgrade"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the installers for Linux"),
    pytest.mark.timeout(900),  # the first test waits until all is built
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_posix_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True)


def test_nothing_starts_by_itself() -> None:
    for script in SCRIPTS:
        words = script.read_text()
        assert "systemctl" not in words
        assert "switch(True)" not in words


# a package for Debian


@pytest.mark.slow
@needs("lintian")
def test_the_package_is_clean(installers: Installers) -> None:
    asked = ["lintian", "--allow-root", "--fail-on", "error,warning,info", installers.debs[0]]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
@needs("dpkg-deb")
def test_whoever_builds_the_package_answers_for_it(installers: Installers) -> None:
    asked = ["dpkg-deb", "--field", installers.debs[0], "Maintainer"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "Ada Lovelace <ada@analytical.engineering>"


@pytest.mark.slow
@needs("dpkg-deb", "desktop-file-validate", "appstreamcli", "systemd-analyze", "man")
def test_what_desktops_read_is_valid(installers: Installers, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", installers.debs[0], tmp_path], check=True)
    share = tmp_path / "usr/share"
    subprocess.run(["desktop-file-validate", share / "applications/org.swarmkit.tray.desktop"], check=True)
    metainfo = share / "metainfo/org.swarmkit.tray.metainfo.xml"
    subprocess.run(["appstreamcli", "validate", "--no-net", metainfo], check=True)
    manual = ["man", "--warnings", "-l", share / "man/man1/swarmkit.1.gz"]
    assert subprocess.run(manual, capture_output=True, check=True).stderr == b""
    unit = (tmp_path / "usr/lib/systemd/user/swarmkit-worker.service").read_text()
    # The programs that it names are not installed here.
    here = tmp_path / "swarmkit-worker.service"
    here.write_text(unit.replace("/usr/bin/swarmkit", "/bin/true").replace("man:swarmkit(1)", "man:sh(1)"))
    run_time = tmp_path / "run"
    run_time.mkdir(mode=0o700)
    verify = ["systemd-analyze", "verify", "--user", here]
    subprocess.run(verify, check=True, env={**os.environ, "XDG_RUNTIME_DIR": str(run_time)})


class Machine:
    """A root folder into which dpkg installs, with one person on it. The machine itself stays as it is."""

    def __init__(self, root: Path, person: Person, uid: int) -> None:
        self.root, self.person, self.uid = root, person, uid
        for folder in ("var/lib/dpkg/info", "var/lib/dpkg/updates", "etc"):
            (root / folder).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()
        (root / "etc/passwd").write_text(f"somebody:x:{uid}:{uid}::{person.home}:/bin/sh\n")
        person.launcher = root / "usr/bin/swarmkit"
        person.variables["SWARMKIT_PACKAGE"] = str(root / "usr/share/swarmkit")

    def dpkg(self, *arguments: str | Path) -> None:
        command = ["dpkg", f"--root={self.root}", "--force-script-chrootless", "--force-depends"]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False, timeout=170
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, deb: Path) -> None:
        """The wheel's place is in this root, as it is not for dpkg's scripts."""
        self.dpkg("-i", deb)
        requirement = self.root / "usr/share/swarmkit/requirement"
        requirement.write_text(requirement.read_text().replace("file:///usr", f"file://{self.root}/usr"))

    def files(self) -> set[Path]:
        folders = [self.root / name for name in ("usr", "etc")]
        return {path for folder in folders for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def machine(person: Person, tmp_path: Path) -> Machine:
    if os.getuid() != 0:
        pytest.skip("only root installs packages")
    return Machine(tmp_path / "root", person, uid=0)


@pytest.mark.slow
@needs("dpkg")
def test_another_person_than_root_loses_nothing_but_swarmkit(
    person: Person, installers: Installers, uv: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root installs packages")
    person.become(12345, uv)
    machine = Machine(person.home.parent / "root", person, uid=12345)
    traces = person.traces()
    machine.install(installers.debs[0])
    lives_in(person)
    machine.dpkg("--purge", "swarmkit")
    assert person.processes() == []
    assert person.traces() == traces


@pytest.mark.slow
@needs("dpkg")
def test_the_package_comes_and_goes(machine: Machine, installers: Installers) -> None:
    before, traces = machine.files(), machine.person.traces()
    machine.install(installers.debs[0])
    assert machine.person.traces() == traces  # homes are nobody's business
    assert "Commands" in machine.person.run(machine.person.launcher, "--help")
    machine.dpkg("--purge", "swarmkit")
    assert (machine.files(), machine.person.traces()) == (before, traces)


@pytest.mark.slow
@needs("dpkg")
def test_an_upgrade_of_the_package_keeps_settings_and_what_runs(
    machine: Machine, installers: Installers
) -> None:
    person = machine.person
    machine.install(installers.debs[0])
    lives_in(person)
    machine.install(installers.debs[1])
    assert '"on_battery": true' in person.run(person.launcher, "worker", "set")
    assert runs(person)
    assert not autostart(person).exists()
    assert len(list((person.home / ".local/share/swarmkit/envs").glob("*/complete"))) == 2
    machine.dpkg("--purge", "swarmkit")


@pytest.mark.slow
@needs("dpkg")
@pytest.mark.parametrize("when", ["while it runs", "while it is paused", "after an upgrade"])
def test_removing_the_package_ends_it_and_keeps_what_is_the_persons(
    machine: Machine, installers: Installers, when: str
) -> None:
    person, before, traces = machine.person, machine.files(), machine.person.traces()
    machine.install(installers.debs[0])
    lives_in(person)
    switch_on(person)
    if when == "while it is paused":
        person.run(person.launcher, "worker", "pause")
    elif when == "after an upgrade":
        machine.install(installers.debs[1])
        person.run(person.launcher, "--version")
    machine.dpkg("--remove", "swarmkit")
    assert person.processes() == []
    kept = person.traces() - traces
    assert ".config/swarmkit/worker.json" in kept
    assert not any("envs" in path or "autostart" in path or "run/" in path for path in kept)
    machine.dpkg("--purge", "swarmkit")
    assert (machine.files(), person.traces()) == (before, traces)


# the script for all other systems


def lives_in(person: Person) -> None:
    """Change a setting, and start the tray, which starts a worker."""
    person.run(person.launcher, "worker", "set", "rules.on_battery=true")
    person.start(person.launcher, "tray", "--host", "none", "--link")
    wait_until(lambda: runs(person), "tray and worker run", every=0.2)


def runs(person: Person) -> bool:
    told = json.loads(person.run(person.launcher, "uninstall", "--what", "--json").splitlines()[-1])
    return {"tray", "worker"} <= {process["what"] for process in told["processes"]}


def autostart(person: Person) -> Path:
    return person.home / ".config" / "autostart" / "swarmkit-tray.desktop"


def switch_on(person: Person) -> None:
    """Choose to start at log-in, as the page of settings does."""
    environment = next((person.home / ".local/share/swarmkit/envs").glob("*/bin/python"))
    code = "from swarmkit.worker import autostart; autostart.switch(True)"
    person.variables["SWARMKIT_LAUNCHER"] = str(person.launcher)
    person.run(environment, "-c", code)
    del person.variables["SWARMKIT_LAUNCHER"]


@pytest.mark.slow
@pytest.mark.parametrize("when", EVERY_END)
def test_the_script_installs_and_removes_all_of_it(person: Person, installers: Installers, when: str) -> None:
    before = person.traces()
    person.run(installers.folders[0] / "bootstrap.sh")
    assert person.processes() == []
    assert not autostart(person).exists()
    if when != "before it ever ran":
        lives_in(person)
    if when == "while it is paused":
        person.run(person.launcher, "worker", "pause")
    if when == "after an upgrade":
        switch_on(person)
        person.run(installers.folders[1] / "bootstrap.sh")
        assert f'Exec="{person.launcher}" "tray"' in autostart(person).read_text()
    person.run(installers.folders[0] / "bootstrap.sh", "--uninstall")
    assert person.processes() == []
    assert person.traces() == before


@pytest.mark.slow
def test_an_upgrade_keeps_settings_and_switches_nothing_on(person: Person, installers: Installers) -> None:
    environments = person.home / ".local/share/swarmkit/envs"
    person.run(installers.folders[0] / "bootstrap.sh")
    lives_in(person)
    (first,) = environments.glob("*/complete")
    person.run(installers.folders[1] / "bootstrap.sh")
    assert first.exists()  # somebody uses it
    assert not autostart(person).exists()
    person.run(person.launcher, "worker", "stop")
    assert '"on_battery": true' in person.run(person.launcher, "worker", "set")
    person.run(person.launcher, "uninstall", "--yes", "--keep", "settings")
    assert person.traces() == {".config/mine", ".config/swarmkit", ".config/swarmkit/worker.json"}


@pytest.mark.slow
def test_an_environment_goes_when_nobody_uses_it_any_more(person: Person, installers: Installers) -> None:
    for folder in installers.folders:
        person.run(folder / "bootstrap.sh")
    assert len(list((person.home / ".local/share/swarmkit/envs").glob("*/complete"))) == 1


@pytest.mark.slow
def test_uv_comes_from_the_package_index_where_it_is_missing(person: Person, installers: Installers) -> None:
    before = person.traces()
    person.variables["PATH"] = "/usr/bin:/bin"
    person.variables["UV_CACHE_DIR"] = str(person.home / ".local/share/swarmkit/uv/cache")
    assert "installing uv from the Python package index" in person.run(installers.folders[0] / "bootstrap.sh")
    assert (person.home / ".local/share/swarmkit/uv/bin/uv").exists()
    person.run(person.launcher, "uninstall", "--yes")
    assert person.traces() == before


@pytest.mark.slow
def test_python_makes_the_environment_where_there_is_no_uv(person: Person, installers: Installers) -> None:
    person.variables |= {"SWARMKIT_NO_UV": "1", "PIP_NO_DEPS": "1"}
    person.run(installers.folders[0] / "bootstrap.sh")
    (python,) = (person.home / ".local/share/swarmkit/envs").glob("*/bin/python")
    code = "import swarmkit._version as v; print(v.__file__)"
    assert str(python.parents[1]) in person.run(python, "-c", code)


@pytest.mark.slow
def test_an_upgrade_that_fails_leaves_the_former_version(person: Person, installers: Installers) -> None:
    person.run(installers.folders[0] / "bootstrap.sh")
    person.variables |= {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(person.home / "empty"), "UV_NO_INDEX": "1"}
    assert "the former one goes on" in person.run(installers.folders[1] / "bootstrap.sh")
    assert "swarmkit 0.1.0" in person.run(person.launcher, "--version")


@pytest.mark.slow
def test_a_launcher_of_another_installation_is_not_replaced(person: Person, installers: Installers) -> None:
    person.launcher.parent.mkdir(parents=True)
    person.launcher.write_text("#!/bin/sh\n")
    said = person.run(installers.folders[0] / "bootstrap.sh", ok=False)
    assert "belongs to another installation" in said
    assert person.launcher.read_text() == "#!/bin/sh\n"


@pytest.mark.slow
def test_tray_and_worker_need_no_more_than_the_set_up_for_windows_installs(
    person: Person, installers: Installers
) -> None:
    program, before = person.home / ".local/share/swarmkit/envs/1", person.traces()
    (wheel,) = installers.folders[0].glob("*.whl")
    requirements = LINUX.parent / "windows" / "tray-requirements.txt"
    install = ["uv", "pip", "install", "--python", program / "bin/python"]
    person.run("uv", "venv", program)
    person.run(*install, "-r", requirements)
    person.run(*install, "--no-deps", wheel)
    person.launcher = program / "bin/swarmkit"
    lives_in(person)
    person.run(person.launcher, "uninstall", "--yes")
    assert person.processes() == []
    assert person.traces() == before
