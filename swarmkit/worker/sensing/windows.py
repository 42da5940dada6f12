"""Windows. Written from the documentation, and not tested on one yet."""

from __future__ import annotations

import ctypes
from typing import Any

from swarmkit.worker.sensing.probes import UnknownError

_REMOTE_SESSION = 0x1000  # SM_REMOTESESSION
_NOT_PRESENT, _FULL_SCREEN, _PRESENTATION = 1, 3, 4
"""Of `SHQueryUserNotificationState`: locked or saver; Direct3D full screen; presentation. Its `busy` (2) is
left out, for which overlays that nobody sees are enough."""


class _LastInput(ctypes.Structure):
    """LASTINPUTINFO."""

    _fields_ = [("size", ctypes.c_uint), ("at_ms", ctypes.c_uint)]


def idle_s() -> float:
    """Seconds since the last input in this session."""
    last = _LastInput()
    last.size = ctypes.sizeof(last)
    if not _library("user32").GetLastInputInfo(ctypes.byref(last)):
        raise UnknownError("Windows does not tell when the last input was")
    now_ms = _library("kernel32").GetTickCount() & 0xFFFFFFFF
    return ((now_ms - last.at_ms) & 0xFFFFFFFF) / 1e3


def locked() -> bool:
    """Whether nobody is at the screen: locked, or the screen saver runs."""
    return _notification_state() == _NOT_PRESENT


def full_screen() -> str:
    """Whether a game or a presentation fills the screen; Windows does not tell which."""
    return "a program" if _notification_state() in (_FULL_SCREEN, _PRESENTATION) else ""


def film() -> str:
    """Not known: which program keeps the display awake is told to administrators only."""
    raise UnknownError("Windows does not tell whether a film plays; list your player by name")


def remote_session() -> bool:
    """Whether this session is used over the network."""
    return bool(_library("user32").GetSystemMetrics(_REMOTE_SESSION))


def _notification_state() -> int:
    state = ctypes.c_int()
    if _library("shell32").SHQueryUserNotificationState(ctypes.byref(state)):
        raise UnknownError("Windows does not tell what fills the screen")
    return state.value


def _library(name: str) -> Any:
    libraries = getattr(ctypes, "windll", None)
    if libraries is None:
        raise UnknownError("this is not Windows")
    return getattr(libraries, name)
