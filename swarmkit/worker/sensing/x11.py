"""An X server: seconds since the last input, and the program that fills the screen."""

from __future__ import annotations

import threading
from typing import Any

import psutil

from swarmkit.worker.sensing.probes import UnknownError


class X11:
    """A connection to one display, opened when it is first asked, and again after an error."""

    def __init__(self, display: str) -> None:
        self._name = display
        self._display: Any = None
        self._lock = threading.Lock()

    def idle_s(self) -> float:
        """Seconds since the last input. Raises: UnknownError."""
        return self._asked(_idle_s)

    def full_screen(self) -> str:
        """The program whose active window fills the screen; empty if none does. Raises: UnknownError."""
        return self._asked(_full_screen)

    def _asked(self, question: Any) -> Any:
        try:
            from Xlib import display
        except ImportError:
            raise UnknownError("install the extra `worker` to ask the X server") from None
        with self._lock:
            try:
                if self._display is None:
                    self._display = display.Display(self._name)
                return question(self._display)
            except UnknownError:
                raise
            except Exception as error:
                self._display = None  # whatever state it is in
                raise UnknownError(f"the X server {self._name} does not answer: {error}") from error


def _idle_s(display: Any) -> float:
    from Xlib.ext import screensaver  # noqa: F401 - adds its questions to windows

    if not display.has_extension("MIT-SCREEN-SAVER"):
        raise UnknownError("the X server does not count the time without input")
    return display.screen().root.screensaver_query_info().idle / 1e3


def _full_screen(display: Any) -> str:
    from Xlib import X

    def values(window: Any, name: str, kind: int) -> list[int]:
        found = window.get_full_property(display.get_atom(name), kind)
        return [] if found is None else list(found.value)

    active = values(display.screen().root, "_NET_ACTIVE_WINDOW", X.AnyPropertyType)
    if not active or not active[0]:
        return ""
    window = display.create_resource_object("window", active[0])
    states = values(window, "_NET_WM_STATE", X.AnyPropertyType)
    if display.get_atom("_NET_WM_STATE_FULLSCREEN") not in states:
        return ""
    pids = values(window, "_NET_WM_PID", X.AnyPropertyType)
    try:
        return psutil.Process(pids[0]).name() if pids else "a program"
    except psutil.Error:
        return "a program"
