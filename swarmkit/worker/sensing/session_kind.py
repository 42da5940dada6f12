"""Which kind of desktop a session is, by its environment variables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal


@dataclass(frozen=True)
class Desktop:
    """A session's kind.

    Attributes:
        display: the X server's name, or the path of the Wayland compositor's socket; empty where neither is
            known.
    """

    kind: Literal["wayland", "x11", "none"]
    display: str = ""


def desktop_of(environment: Mapping[str, str]) -> Desktop:
    """Return the kind of desktop. Under Wayland `DISPLAY` is for older programs only."""
    kind = environment.get("XDG_SESSION_TYPE", "")
    if kind == "wayland" or environment.get("WAYLAND_DISPLAY"):
        path = socket_of(environment.get("WAYLAND_DISPLAY", ""), environment.get("XDG_RUNTIME_DIR", ""))
        return Desktop("wayland", path)
    display = environment.get("DISPLAY", "")
    return Desktop("x11", display) if display else Desktop("none")


def socket_of(display: str, runtime_folder: str) -> str:
    """The path of the compositor's socket by `WAYLAND_DISPLAY` and `XDG_RUNTIME_DIR`; empty without one."""
    path = PurePosixPath(runtime_folder, display or "wayland-0")
    return str(path) if path.is_absolute() else ""
