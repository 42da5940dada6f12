"""Which kind of desktop a session is, by its environment variables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Desktop:
    """A session's kind.

    Attributes:
        display: of the X server; empty unless the kind is `x11`.
    """

    kind: Literal["wayland", "x11", "none"]
    display: str = ""


def desktop_of(environment: Mapping[str, str]) -> Desktop:
    """Return the kind of desktop. Under Wayland `DISPLAY` is for older programs only."""
    kind = environment.get("XDG_SESSION_TYPE", "")
    if kind == "wayland" or environment.get("WAYLAND_DISPLAY"):
        return Desktop("wayland")
    display = environment.get("DISPLAY", "")
    return Desktop("x11", display) if display else Desktop("none")
