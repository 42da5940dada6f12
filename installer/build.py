"""Build the installers that this computer can build, and say of each whether it was built, or why not.

    python -m installer.build                  # into dist/installers
    python -m installer.build --only deb       # one kind

The wheel is built from the working tree first, unless `--wheel` names one.
"""

from __future__ import annotations

import argparse
import getpass
import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

from PIL import Image
from swarmkit_app.tray.icons import icon

from swarmkit._version import __version__
from tools.check_wheel import build as build_wheel

HERE = Path(__file__).parent
OUT = HERE.parent / "dist" / "installers"
SIDES = (16, 24, 32, 48, 64, 128, 256)
"""Pixels of the icons."""
UV_WHEEL_OF_WINDOWS = ("--platform", "win_amd64", "--python-version", "3.12")


class SkippedError(Exception):
    """This computer cannot build it; the message says why."""


def build_date() -> datetime:
    """The moment that artefacts carry: that of the last commit, so that two builds of it are alike."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        asked = subprocess.run(
            ["git", "log", "-1", "--format=%ct"], cwd=HERE, capture_output=True, text=True, check=False
        )
        given = asked.stdout.strip() or "0"
    return datetime.fromtimestamp(int(given), timezone.utc)


def maintainer() -> str:
    """Who answers for a package: `DEBFULLNAME` and `DEBEMAIL`, as for Debian's tools, else git's settings.

    Without either it is the person who builds it, on this computer.
    """
    name = os.environ.get("DEBFULLNAME") or _git("user.name") or getpass.getuser()
    address = os.environ.get("DEBEMAIL") or _git("user.email") or f"{getpass.getuser()}@{socket.getfqdn()}"
    return f"{name} <{address}>"


def _git(setting: str) -> str:
    asked = subprocess.run(["git", "config", setting], cwd=HERE, capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def filled(name: str, **values: str) -> str:
    """Read a file of this folder, with `@NAME@` replaced by values."""
    date = build_date()
    values |= {
        "VERSION": __version__,
        "MAINTAINER": maintainer(),
        "DATE": f"{date:%Y-%m-%d}",
        "RFC_DATE": f"{date:%a, %d %b %Y %H:%M:%S +0000}",
    }
    text = (HERE / name).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def put(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)


def gzipped(text: str) -> bytes:
    """As Debian wants it: the best compression, without name and date."""
    return gzip.compress(text.encode(), 9, mtime=0)


def put_icons(folder: Path, name: str) -> None:
    """Draw the tray's icon in all sizes; `{side}` in the name is the number of pixels."""
    for side in SIDES:
        path = folder / name.format(side=side)
        path.parent.mkdir(parents=True, exist_ok=True)
        icon("working", side).save(path)


def deb(wheel: Path, out: Path) -> Path:
    """Debian's package: the wheel, the launcher, and what a desktop needs to know."""
    need("dpkg-deb")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "swarmkit"
        share, doc = root / "usr/share", root / "usr/share/doc/swarmkit"
        places = {"LAUNCHER": "/usr/bin/swarmkit", "PACKAGE": "/usr/share/swarmkit"}
        put(share / "swarmkit" / wheel.name, wheel.read_bytes())
        requirement = f"swarmkit-llm[tray] @ file:///usr/share/swarmkit/{wheel.name}"
        put(share / "swarmkit/requirement", requirement + "\n")
        put(share / "swarmkit/id", identity_of(wheel) + "\n")
        put(root / "usr/bin/swarmkit", filled("linux/launcher.sh", **places), 0o755)
        entry = filled("linux/org.swarmkit.tray.desktop", LAUNCHER="swarmkit")
        put(share / "applications/org.swarmkit.tray.desktop", entry)
        unit = filled("linux/swarmkit-worker.service", **places)
        put(root / "usr/lib/systemd/user/swarmkit-worker.service", unit)
        metainfo = filled("linux/org.swarmkit.tray.metainfo.xml")
        put(share / "metainfo/org.swarmkit.tray.metainfo.xml", metainfo)
        put(share / "man/man1/swarmkit.1.gz", gzipped(filled("linux/swarmkit.1")))
        put(doc / "copyright", filled("linux/debian/copyright"))
        put(doc / "changelog.Debian.gz", gzipped(filled("linux/debian/changelog")))
        put(share / "lintian/overrides/swarmkit", filled("linux/debian/lintian-overrides"))
        put_icons(share / "icons/hicolor", "{side}x{side}/apps/org.swarmkit.tray.png")
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) // 1024
        put(root / "DEBIAN/control", filled("linux/debian/control", SIZE=str(size)))
        for script in ("prerm", "postrm"):
            put(root / "DEBIAN" / script, filled(f"linux/debian/{script}"), 0o755)
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        target = out / f"swarmkit_{__version__}-1_all.deb"
        run("dpkg-deb", "--root-owner-group", "-Zxz", "-z1", "--build", root, target)
    return target


def tarball(wheel: Path, out: Path) -> Path:
    """For all other Linux systems: the bootstrap script, and what it installs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"swarmkit-{__version__}-linux"
        for name in ("bootstrap.sh", "launcher.sh", "org.swarmkit.tray.desktop", "swarmkit-worker.service"):
            put(folder / name, (HERE / "linux" / name).read_text(), 0o755 if name.endswith(".sh") else 0o644)
        put(folder / wheel.name, wheel.read_bytes())
        put_icons(folder / "icons", "{side}.png")
        target = out / f"{folder.name}.tar.gz"
        with tarfile.open(target, "w:gz") as file:
            file.add(folder, folder.name, filter=of_nobody)
    return target


def of_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names of whoever built it."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = int(build_date().timestamp())
    return member


def windows(wheel: Path, out: Path, compressor: str = "lzma") -> Path:
    """The set-up for Windows: the tray runs natively, and the worker in WSL2."""
    need("makensis")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        linux = tarball(wheel, folder)
        shutil.copy(wheel, folder)
        put(folder / "uv.exe", uv_of_windows())
        icon("working", 256).save(folder / "swarmkit.ico", sizes=[(side, side) for side in SIDES])
        for path in (HERE / "windows").iterdir():
            put(folder / path.name, path.read_text().replace("\n", "\r\n"))
        put(folder / "id.txt", identity_of(wheel))
        target = out / f"swarmkit-{__version__}-setup.exe"
        names = {"VERSION": __version__, "WHEEL": wheel.name, "TARBALL": linux.name, "OUT": str(target)}
        names["COMPRESSOR"] = compressor
        run("makensis", "-V2", *(f"-D{name}={value}" for name, value in names.items()), folder / "setup.nsi")
    return target


def uv_of_windows() -> bytes:
    """`uv.exe` out of uv's own wheel for Windows, from the Python package index."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*download, *UV_WHEEL_OF_WINDOWS, "-d", folder, "uv"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SkippedError(
                f"uv for Windows is not on the package index here: {done.stderr.strip()[-200:]}"
            )
        (found,) = Path(folder).glob("uv-*.whl")
        with zipfile.ZipFile(found) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/uv.exe"))
            return archive.read(name)


def macos(wheel: Path, out: Path) -> Path:
    """The application for macOS, neither signed nor tried."""
    with tempfile.TemporaryDirectory() as temporary:
        contents = Path(temporary) / "swarmkit.app" / "Contents"
        put(contents / "Info.plist", filled("macos/Info.plist"))
        put(contents / "MacOS/swarmkit", filled("macos/launcher.sh"), 0o755)
        put(contents / "Resources" / wheel.name, wheel.read_bytes())
        put(contents / "Resources/id", identity_of(wheel) + "\n")
        put(contents / "Resources/org.swarmkit.worker.plist", filled("macos/org.swarmkit.worker.plist"))
        largest: Image.Image = icon("working", 256)
        largest.save(contents / "Resources/swarmkit.icns")
        target = out / f"swarmkit-{__version__}-macos.tar.gz"
        with tarfile.open(target, "w:gz") as file:
            file.add(contents.parent, "swarmkit.app", filter=of_nobody)
    return target


KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "deb": deb,
    "linux": tarball,
    "windows": windows,
    "macos": macos,
}


def identity_of(wheel: Path) -> str:
    """Names the content of a wheel, and so the environment that is made from it."""
    return hashlib.sha256(wheel.read_bytes()).hexdigest()[:16]


def need(program: str) -> None:
    """Raises: SkippedError: the program is not installed."""
    if shutil.which(program) is None:
        raise SkippedError(f"{program} is not installed")


def run(*command: str | Path) -> None:
    """Run a command; ends with its words if it fails."""
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def build_all(kinds: Iterable[str], wheel: Path, out: Path) -> dict[str, str]:
    """Build; returns for each kind what was built, or why it was not."""
    out.mkdir(parents=True, exist_ok=True)
    return {kind: build_one(kind, wheel, out) for kind in kinds}


def build_one(kind: str, wheel: Path, out: Path) -> str:
    """Build one kind; returns what was built, or why it was not."""
    try:
        built = KINDS[kind](wheel, out)
    except SkippedError as error:
        return f"skipped: {error}"
    return f"built: {built} ({built.stat().st_size / 1e6:.1f} MB)"


def main() -> None:
    """Build what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(KINDS), help="may be repeated")
    parser.add_argument("--wheel", type=Path, help="in place of one that is built from the working tree")
    parser.add_argument("--out", type=Path, default=OUT)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        wheel = wanted.wheel or build_wheel(Path(temporary) / "wheel")
        for kind, said in build_all(wanted.only or KINDS, wheel, wanted.out).items():
            print(f"{kind:<8} {said}")


if __name__ == "__main__":
    main()
