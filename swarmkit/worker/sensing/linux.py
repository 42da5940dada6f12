"""A Linux desktop: X11 and Wayland's compositors are asked directly, GNOME and logind over D-Bus.

Under Wayland X11 is never asked: the X server that runs there for older programs sees only their input, and
one that has been left behind does not answer at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from swarmkit.worker.sensing.dbus import SESSION, SYSTEM, desktop_bus
from swarmkit.worker.sensing.probes import UnknownError
from swarmkit.worker.sensing.session_kind import Desktop, desktop_of
from swarmkit.worker.sensing.session_providers import SessionProviders, logged_in_remotely

_LOGIND = "org.freedesktop.login1"
_OWN_SESSION = "/org/freedesktop/login1/session/auto"
_PLAYER = "org.mpris.MediaPlayer2"


def providers(environment: Mapping[str, str]) -> SessionProviders:
    """Return the providers for the desktop that the environment variables tell of."""
    desktop = desktop_of(environment)
    return SessionProviders(
        idle_s=idle_provider(desktop),
        locked=locked,
        full_screen=_full_screen_on_x11(desktop) if desktop.kind == "x11" else _full_screen_elsewhere,
        film=film,
        remote_session=remote_session,
    )


def idle_provider(desktop: Desktop) -> Callable[[], float]:
    """Return what tells the seconds since the last input."""
    if desktop.kind == "x11":
        from swarmkit.worker.sensing.x11 import X11

        return X11(desktop.display).idle_s
    if desktop.kind == "wayland":
        from swarmkit.worker.sensing.wayland import WaylandIdle

        of_compositor = (WaylandIdle(desktop.display).idle_s,) if desktop.display else ()
        return lambda: _first(idle_of_mutter, *of_compositor, idle_of_screen_saver, idle_of_logind)
    return lambda: _first(idle_of_logind)


def _first(*ways: Callable[[], float]) -> float:
    """Return the first answer.

    Raises:
        UnknownError: with the reasons of all.
    """
    reasons = []
    for way in ways:
        try:
            return way()
        except UnknownError as error:  # noqa: PERF203 - each of them may be missing
            reasons.append(str(error))
    raise UnknownError("; ".join(reasons))


def idle_of_mutter() -> float:
    """GNOME's window manager, under Wayland and X11."""
    name = "org.gnome.Mutter.IdleMonitor"
    path = "/org/gnome/Mutter/IdleMonitor/Core"
    return desktop_bus().call(SESSION, name, path, name, "GetIdletime")[0] / 1e3


def idle_of_screen_saver() -> float:
    """The desktop's screen saver; KDE's answers under X11 only."""
    name, path = "org.freedesktop.ScreenSaver", "/org/freedesktop/ScreenSaver"
    return desktop_bus().call(SESSION, name, path, name, "GetSessionIdleTime")[0] / 1e3


def idle_of_logind() -> float:
    """What the desktop has told logind. Some never do: then it is not known, rather than "in use"."""
    asked = SYSTEM, _LOGIND, _OWN_SESSION, f"{_LOGIND}.Session"
    if not desktop_bus().property(*asked, "IdleHint"):
        raise UnknownError("the desktop has not told logind that nobody is here")
    since_us = desktop_bus().property(*asked, "IdleSinceHintMonotonic")
    return max(0.0, _monotonic() - since_us / 1e6)


def locked() -> bool:
    """Whether the screen is locked, by logind or by the screen saver."""
    asked = SYSTEM, _LOGIND, _OWN_SESSION, f"{_LOGIND}.Session"
    known = False
    try:
        known = True
        if desktop_bus().followed_property(*asked, "LockedHint"):
            return True
    except UnknownError:
        known = False
    name, path = "org.freedesktop.ScreenSaver", "/org/freedesktop/ScreenSaver"
    try:
        if name not in desktop_bus().names():
            raise UnknownError("this desktop has neither logind nor a screen saver that tells")
        return bool(desktop_bus().call(SESSION, name, path, name, "GetActive")[0])
    except UnknownError:
        if known:
            return False
        raise


def film() -> str:
    """The first player that plays, by the interface that players and browsers have for media keys."""
    for name in sorted(desktop_bus().names()):
        if name.startswith(f"{_PLAYER}.") and _plays(name):
            return _identity(name)
    return ""


def remote_session() -> bool:
    """Whether a session of this person, or the system's list of users, says that somebody is far away."""
    asked = SYSTEM, _LOGIND, _OWN_SESSION, f"{_LOGIND}.Session"
    try:
        if desktop_bus().followed_property(*asked, "Remote"):
            return True
    except UnknownError:
        pass  # without logind the list of users is all there is
    return logged_in_remotely()


def _full_screen_on_x11(desktop: Desktop) -> Callable[[], str]:
    from swarmkit.worker.sensing.x11 import X11

    screen = X11(desktop.display)
    return lambda: screen.full_screen() or game_mode()


def _full_screen_elsewhere() -> str:
    if game := game_mode():
        return game
    raise UnknownError("this desktop does not tell which program fills the screen; list your games by name")


def game_mode() -> str:
    """Whether a game has asked for Feral's GameMode; empty without one, or without GameMode."""
    name = "com.feralinteractive.GameMode"
    try:
        if name not in desktop_bus().names():  # to ask would start it
            return ""
        clients = desktop_bus().property(SESSION, name, "/com/feralinteractive/GameMode", name, "ClientCount")
    except UnknownError:
        return ""
    return "a game" if clients > 0 else ""


def _plays(name: str) -> bool:
    try:
        status = desktop_bus().property(
            SESSION, name, "/org/mpris/MediaPlayer2", f"{_PLAYER}.Player", "PlaybackStatus"
        )
    except UnknownError:
        return False  # it has ended, or hangs
    return bool(status == "Playing")


def _identity(name: str) -> str:
    try:
        return str(desktop_bus().property(SESSION, name, "/org/mpris/MediaPlayer2", _PLAYER, "Identity"))[
            :256
        ]
    except UnknownError:
        return name.removeprefix(f"{_PLAYER}.").partition(".")[0]


_monotonic = time.monotonic
"""logind's moments are the kernel's, so no other clock will do."""
