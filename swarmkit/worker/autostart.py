"""Starting the tray when the person logs in. Off until they choose it; an upgrade never switches it on.

Linux: a desktop entry in the person's autostart folder. macOS: a launch agent. Windows: a value under the
person's `Run` key. Each names what started the program that is running now.
"""

from __future__ import annotations

import os
import plistlib
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCHER_VARIABLE = "SWARMKIT_LAUNCHER"
"""An environment variable with the path of the launcher that started this program, where one did."""
_NAME = "swarmkit-tray"
_LABEL = "org.swarmkit.tray"
_RUN_KEY = r"Software\Microsoft\Windows\CurrentVersion\Run"


def is_on() -> bool:
    """Whether the tray starts when the person logs in."""
    if sys.platform == "win32":
        return _windows_value() is not None
    return entry_path().exists()


def switch(on: bool) -> None:
    """Start the tray when the person logs in, or no longer.

    Raises:
        OSError: the entry cannot be written or removed.
    """
    if sys.platform == "win32":
        _switch_on_windows(on)
        return
    path = entry_path()
    if not on:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_launch_agent() if sys.platform == "darwin" else _desktop_entry())


def entry_path() -> Path:
    """The file that makes the system start the tray, on Linux and macOS."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "LaunchAgents" / f"{_LABEL}.plist"
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "autostart" / f"{_NAME}.desktop"


def command() -> list[str]:
    """The command that starts the tray: the installed launcher, or the Python and the packages that run now.

    An upgrade replaces the environment in which the tray runs. The launcher stays where it is.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    return [launcher, "tray"] if launcher else [sys.executable, "-m", "swarmkit.cli", "tray"]


def _desktop_entry() -> bytes:
    lines = [
        "[Desktop Entry]",
        "Type=Application",
        "Name=swarmkit",
        "Comment=Lend this computer to a swarm while you do not use it",
        f"Exec={' '.join(map(_quoted, command()))}",
        "Terminal=false",
        "X-GNOME-Autostart-enabled=true",
        "",
    ]
    return "\n".join(lines).encode()


def _quoted(word: str) -> str:
    """Quote as desktop entries do: double quotes, in which four characters are escaped, and `%` doubled."""
    for character in '\\"`$':
        word = word.replace(character, f"\\{character}")
    return '"' + word.replace("%", "%%") + '"'


def _launch_agent() -> bytes:
    return plistlib.dumps({"Label": _LABEL, "ProgramArguments": command(), "RunAtLoad": True})


def _windows_value() -> str | None:
    winreg: Any = __import__("winreg")
    try:
        with winreg.OpenKey(winreg.HKEY_CURRENT_USER, _RUN_KEY) as key:
            return str(winreg.QueryValueEx(key, _NAME)[0])
    except FileNotFoundError:
        return None


def _switch_on_windows(on: bool) -> None:
    winreg: Any = __import__("winreg")
    with winreg.CreateKey(winreg.HKEY_CURRENT_USER, _RUN_KEY) as key:
        if on:
            winreg.SetValueEx(key, _NAME, 0, winreg.REG_SZ, subprocess.list2cmdline(command()))
        else:
            try:
                winreg.DeleteValue(key, _NAME)
            except FileNotFoundError:
                return
