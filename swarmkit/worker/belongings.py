"""What swarmkit has put on this computer for one person, so that its removal can show and take away all of
it.

Weights are those of swarmkit's own store. What transformers and huggingface_hub keep in the person's cache of
the Hugging Face Hub serves other programs too, and is not touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from swarmkit.worker import autostart
from swarmkit.worker.control.values import Belonging, BelongingKind, Belongings
from swarmkit.worker.places import WorkerPlaces

_APP = "swarmkit"
APP_ID = "org.swarmkit.tray"
"""The name of desktop entry and icon."""
UNIT = "swarmkit-worker.service"
LAUNCHER_MARK = b"swarmkit's launcher"
"""Is near the beginning of a launcher that an installer wrote."""

WORDS: dict[BelongingKind, str] = {
    "weights": "weights of models, also of other programs that use swarmkit",
    "settings": "settings",
    "identity": "keys, which are this computer's name in swarms",
    "history": "history of what was contributed",
    "log": "log",
    "running": "lock, socket and token",
    "startup": "entry that starts it at log-in",
    "desktop": "entry and icon in the desktop's menu",
    "program": "the program and its Python environment",
    "other": "what else lies in its folders",
}
_KIND_BY_NAME: tuple[tuple[str, BelongingKind], ...] = (
    (r"\.?(worker|pause)\.json(\..*)?", "settings"),
    (r"contributions\.sqlite.*", "history"),
    (r".*\.key(\.lock)?", "identity"),
    (r"worker\.log.*", "log"),
    (r"\.?(file-hashes|kernels)\.json.*", "weights"),
    (r"\.?(control\.(json|sock)|worker\.lock|tray\.(lock|open|pid)).*", "running"),
)
_STORE = ("about", "blobs", "index", "locks", "partial", "quarantine", "users")
"""Folders of the store of weights. A person may have placed the store in a folder with other files."""
_PROGRAM = ("envs", "env", "package", "uv", "python")
"""What an installer makes in swarmkit's data folder."""


def belongings(places: WorkerPlaces | None = None) -> Belongings:
    """Return what swarmkit has put on this computer for this person, and what each part takes."""
    found: dict[Path, BelongingKind] = {}
    for worker in _all_places(places):
        found |= dict.fromkeys(_present(worker.weights / name for name in _STORE), "weights")
    found |= dict.fromkeys(_present(program_folder() / name for name in _PROGRAM), "program")
    found |= dict.fromkeys(_present(startup_entries()), "startup")
    found |= dict.fromkeys(_present(_desktop_entries()), "desktop")
    found |= dict.fromkeys((path for path in _launchers() if _is_ours(path)), "program")
    for folder in own_folders(places):
        for path in _files(folder, set(found)):
            found.setdefault(path, kind_of(path.name))
    parts = [
        Belonging(kind=kind, what=WORDS[kind], path=str(path), size_bytes=size_of(path))
        for path, kind in found.items()
    ]
    return Belongings(parts=tuple(parts), size_bytes=sum(part.size_bytes for part in parts))


def kind_of(name: str) -> BelongingKind:
    """Return what a file in one of swarmkit's folders is, by its name. Pure."""
    return next((kind for pattern, kind in _KIND_BY_NAME if re.fullmatch(pattern, name)), "other")


def own_folders(places: WorkerPlaces | None = None) -> list[Path]:
    """Return the folders that hold nothing but what belongs to swarmkit, the inner ones first."""
    folders = {Path(platformdirs.user_cache_dir(_APP)), Path(platformdirs.user_state_dir(_APP))}
    folders.add(program_folder())
    for worker in _all_places(places):
        folders |= {worker.config, worker.state, worker.runtime, worker.runtime.parent}
    folders -= {_home_of(worker) for worker in _all_places(places)}
    return sorted(folders, key=lambda folder: (-len(folder.parts), folder))


def store_folders(places: WorkerPlaces | None = None) -> list[Path]:
    """Return the folders of the stores of weights."""
    return [worker.weights for worker in _all_places(places)]


def program_folder() -> Path:
    """Return the folder in which installers make Python environments for this person."""
    return Path(platformdirs.user_data_dir(_APP))


def startup_entries() -> list[Path]:
    """Return the files that may make the system start swarmkit when this person logs in."""
    if sys.platform == "win32":
        return []
    if sys.platform == "darwin":
        return [autostart.entry_path(), autostart.entry_path().with_name("org.swarmkit.worker.plist")]
    units = (_config_home() / "systemd" / "user", _data_home() / "systemd" / "user")
    wanted = [units[0] / f"{target}.target.wants" / UNIT for target in ("default", "graphical-session")]
    return [autostart.entry_path(), *wanted, *(folder / UNIT for folder in units)]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; those that vanish meanwhile do not count."""
    total = 0
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).lstat().st_size
    return total


def _all_places(places: WorkerPlaces | None) -> list[WorkerPlaces]:
    """The worker's folders: those that are asked about, and where none are, the usual ones too."""
    if places is not None:
        return [places]
    return list(dict.fromkeys((WorkerPlaces.of_this_person(), WorkerPlaces.usual())))


def _home_of(places: WorkerPlaces) -> Path | None:
    """The folder that `SWARMKIT_WORKER_HOME` names, which may hold files of others."""
    return places.config.parent if places == WorkerPlaces.inside(places.config.parent) else None


def _files(folder: Path, except_for: set[Path]) -> Iterator[Path]:
    """All files in a folder, but not those in `except_for` and below."""
    for at, folders, names in os.walk(folder):
        here = Path(at)
        folders[:] = [name for name in folders if here / name not in except_for]
        links = [name for name in folders if (here / name).is_symlink()]
        yield from (here / name for name in (*names, *links) if here / name not in except_for)


def _present(paths: Iterator[Path] | list[Path]) -> list[Path]:
    return [path for path in paths if os.path.lexists(path)]


def _desktop_entries() -> list[Path]:
    if sys.platform == "darwin":
        return [Path.home() / "Applications" / "swarmkit.app"]
    data = _data_home()
    icons = sorted((data / "icons" / "hicolor").glob(f"*/apps/{APP_ID}.png"))
    return [data / "applications" / f"{APP_ID}.desktop", *icons]


def _launchers() -> list[Path]:
    return [Path.home() / ".local" / "bin" / "swarmkit"]


def _is_ours(launcher: Path) -> bool:
    try:
        with launcher.open("rb") as file:
            return LAUNCHER_MARK in file.read(200)
    except OSError:
        return False


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def _data_home() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
