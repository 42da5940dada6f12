"""An X server: seconds since the last input, and the program that fills the screen."""

from __future__ import annotations

import threading
from typing import Any

import psutil

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.worker.sensing.probes import TRUSTED_S, UnknownError

_ACTIVE, _STATE = "_NET_ACTIVE_WINDOW", "_NET_WM_STATE"


class X11:
    """A connection to one display, opened when it is first asked, and again after an error.

    The X server tells of windows that change. What fills the screen is asked for again only then, and after
    `TRUSTED_S` in any case.
    """

    def __init__(self, display: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._name = display
        self._clock = clock
        self._display: Any = None
        self._lock = threading.Lock()
        self._filled: tuple[str, float] | None = None
        """What fills the screen, and when that was asked; None: it has to be asked."""

    def idle_s(self) -> float:
        """Seconds since the last input. Raises: UnknownError."""
        return self._asked(_idle_s)

    def full_screen(self) -> str:
        """The program whose active window fills the screen; empty if none does. Raises: UnknownError."""
        return self._asked(self._full_screen)

    def _asked(self, question: Any) -> Any:
        try:
            from Xlib import display
        except ImportError:
            raise UnknownError("install the extra `worker` to ask the X server") from None
        with self._lock:
            try:
                if self._display is None:
                    self._display, self._filled = display.Display(self._name), None
                return question(self._display)
            except UnknownError:
                raise
            except Exception as error:
                self._display = None  # whatever state it is in
                raise UnknownError(f"the X server {self._name} does not answer: {error}") from error

    def _full_screen(self, display: Any) -> str:
        now = self._clock.now()
        if _has_changed(display):
            self._filled = None
        if self._filled is None or now - self._filled[1] >= TRUSTED_S:
            self._filled = _full_screen(display), now
        return self._filled[0]


def _idle_s(display: Any) -> float:
    from Xlib.ext import screensaver  # noqa: F401 - adds its questions to windows

    if not display.has_extension("MIT-SCREEN-SAVER"):
        raise UnknownError("the X server does not count the time without input")
    return display.screen().root.screensaver_query_info().idle / 1e3


def _has_changed(display: Any) -> bool:
    """Whether the X server has told of another active window, or of another state of one."""
    from Xlib import X

    atoms = display.get_atom(_ACTIVE), display.get_atom(_STATE)
    events = [display.next_event() for _ in range(display.pending_events())]
    return any(event.type == X.PropertyNotify and event.atom in atoms for event in events)


def _full_screen(display: Any) -> str:
    from Xlib import X, error

    def values(window: Any, name: str, kind: int) -> list[int]:
        found = window.get_full_property(display.get_atom(name), kind)
        return [] if found is None else list(found.value)

    # The changes are asked for first, lest one be missed between the answer and them.
    root = display.screen().root
    root.change_attributes(event_mask=X.PropertyChangeMask)
    active = values(root, _ACTIVE, X.AnyPropertyType)
    if not active or not active[0]:
        return ""
    window = display.create_resource_object("window", active[0])
    gone = error.CatchError(error.BadWindow)
    window.change_attributes(event_mask=X.PropertyChangeMask, onerror=gone)
    states = values(window, _STATE, X.AnyPropertyType)
    if display.get_atom("_NET_WM_STATE_FULLSCREEN") not in states:
        return ""
    pids = values(window, "_NET_WM_PID", X.AnyPropertyType)
    try:
        return psutil.Process(pids[0]).name() if pids else "a program"
    except psutil.Error:
        return "a program"
