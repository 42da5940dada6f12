"""A private message bus on which a desktop answers as the test says, and a private X server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from dbus_fast import PropertyAccess
from dbus_fast.aio import MessageBus
from dbus_fast.service import ServiceInterface, dbus_method, dbus_property, dbus_signal


def _property(name: str, kind: str, value: Any) -> Any:
    def get(self: Any) -> Any:
        return self.said.get(name, value)

    get.__name__ = name
    get.__annotations__ = {"return": kind}
    return dbus_property(access=PropertyAccess.READ)(get)


class Said(ServiceInterface):
    """An interface that says what it was told to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.said: dict[str, Any] = {}


class Mutter(Said):
    @dbus_method()
    def GetIdletime(self) -> t:  # type: ignore[name-defined]  # noqa: F821
        return self.said.get("idle_ms", 0)


class Screensaver(Said):
    @dbus_method()
    def GetSessionIdleTime(self) -> u:  # type: ignore[name-defined]  # noqa: F821
        return self.said.get("idle_ms", 0)

    @dbus_method()
    def GetActive(self) -> b:  # type: ignore[name-defined]  # noqa: F821
        return self.said.get("active", False)


class Player(Said):
    PlaybackStatus = _property("PlaybackStatus", "s", "Stopped")


class PlayerRoot(Said):
    Identity = _property("Identity", "s", "VLC media player")


class Network(Said):
    Metered = _property("Metered", "u", 0)


class LoginSession(Said):
    IdleHint = _property("IdleHint", "b", False)
    IdleSinceHintMonotonic = _property("IdleSinceHintMonotonic", "t", 0)
    LockedHint = _property("LockedHint", "b", False)
    Remote = _property("Remote", "b", False)


class LoginManager(Said):
    """Hands out one end of a pipe for each inhibitor; when that is closed, the sleep may go on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.held: list[int] = []

    @dbus_method()
    def Inhibit(self, what: s, who: s, why: s, mode: s) -> h:  # type: ignore[name-defined]  # noqa: F821
        theirs, ours = os.pipe()
        os.set_blocking(theirs, False)
        self.held.append(theirs)
        self.given = ours
        return ours

    @dbus_signal()
    def PrepareForSleep(self, going: b) -> b:  # type: ignore[name-defined]  # noqa: F821
        return going


class Game(Said):
    ClientCount = _property("ClientCount", "i", 0)


SERVICES = {
    "mutter": (Mutter, "org.gnome.Mutter.IdleMonitor", "/org/gnome/Mutter/IdleMonitor/Core", None),
    "saver": (Screensaver, "org.freedesktop.ScreenSaver", "/org/freedesktop/ScreenSaver", None),
    "player": (
        Player,
        "org.mpris.MediaPlayer2.vlc",
        "/org/mpris/MediaPlayer2",
        "org.mpris.MediaPlayer2.Player",
    ),
    "network": (Network, "org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager", None),
    "login": (
        LoginSession,
        "org.freedesktop.login1",
        "/org/freedesktop/login1/session/auto",
        "org.freedesktop.login1.Session",
    ),
    "manager": (
        LoginManager,
        "org.freedesktop.login1",
        "/org/freedesktop/login1",
        "org.freedesktop.login1.Manager",
    ),
    "game": (Game, "com.feralinteractive.GameMode", "/com/feralinteractive/GameMode", None),
}


class SaidDesktop:
    """Services on a private bus, each of which is there from when it is first told something."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._bus = self._do(self._connect())
        self.services: dict[str, Any] = {}

    async def _connect(self) -> Any:
        return await MessageBus(bus_address=self.address, negotiate_unix_fd=True).connect()

    def say(self, service: str, **said: Any) -> Any:
        """From now on the service answers so, and tells of it where that is a property."""
        if service not in self.services:
            self._do(self._offer(service))
        self.services[service].said.update(said)
        self._do(self._tell(service, [name for name in said if name[0].isupper()]))
        return self.services[service]

    async def _tell(self, service: str, properties: list[str]) -> None:
        if properties:
            of = self.services[service]
            of.emit_properties_changed({name: of.said[name] for name in properties})

    def signal_sleep(self, going: bool) -> None:
        """As logind announces a sleep, and its end."""

        async def emit() -> None:
            self.services["manager"].PrepareForSleep(going)

        self._do(emit())

    async def _offer(self, service: str) -> None:
        kind, name, path, interface = SERVICES[service]
        self.services[service] = kind(interface or name)
        self._bus.export(path, self.services[service])
        if kind is Player:
            self._bus.export(path, PlayerRoot("org.mpris.MediaPlayer2"))
        await self._bus.request_name(name)

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._bus.disconnect)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def message_bus() -> Iterator[str]:
    """A message bus of its own; its address."""
    daemon = subprocess.Popen(
        ["dbus-daemon", "--session", "--print-address=1", "--nofork", "--nopidfile"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert daemon.stdout is not None
    try:
        yield daemon.stdout.readline().strip()
    finally:
        daemon.kill()
        daemon.wait()
        daemon.stdout.close()


@contextlib.contextmanager
def x_server(screen: str = "320x200x24") -> Iterator[str]:
    """An X server whose screen nobody sees; the name of its display."""
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", screen, "-nolisten", "tcp"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    try:
        with os.fdopen(read) as told:
            yield f":{told.readline().strip()}"
    finally:
        server.terminate()
        server.wait()


def missing(*programs: str) -> str:
    """Why tests with these programs cannot run here; empty if they can."""
    absent = [program for program in programs if shutil.which(program) is None]
    return f"{', '.join(absent)} is not installed" if absent else ""
