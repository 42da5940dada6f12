"""The tray as a program: it owns the icon, the watch over the worker, and the pages."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

from filelock import FileLock, Timeout

from swarmkit.errors import SwarmkitError, UsageError
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.values import Status
from swarmkit.worker.pause import Haste, Until
from swarmkit.worker.places import WorkerPlaces, write_atomically
from swarmkit.worker.removal import QUIT, TRAY_PID, TRAY_REQUEST
from swarmkit.worker.sensing.dbus import close_desktop_bus
from swarmkit.worker.sensing.session import OwnSession, SessionSensing
from swarmkit_app.tray.face import TrayFace, face_of, news
from swarmkit_app.tray.host import NoTrayHostError, TrayHost
from swarmkit_app.tray.pages import TrayPages
from swarmkit_app.tray.watch import WorkerWatch

logger = logging.getLogger(__name__)

HostKind = Literal["auto", "status-notifier", "pystray", "none"]
PAGES = ("dashboard", "settings", "wizard", "log")
_WORKER_STARTS_S = 20.0
_WORKER_ENDS_S = 60.0
_LOOK_FOR_REQUEST_S = 1.5


class TrayRunsError(UsageError):
    """Another tray of this person runs."""


class Tray:
    """One tray. `run` blocks until the person quits.

    Args:
        show_page: opens an address in the person's browser.
    """

    def __init__(
        self,
        host: TrayHost,
        places: WorkerPlaces | None = None,
        sensing: SessionSensing | None = None,
        show_page: Callable[[str], object] = webbrowser.open,
    ) -> None:
        self._places = places or WorkerPlaces.of_this_person()
        self._client = WorkerClient(self._places)
        self._host, self._show_page = host, show_page
        self._watch = WorkerWatch(self._client, sensing or OwnSession(), self._on_status)
        self._pages = TrayPages(self._client, self._places, self.start_worker)
        self._status: Status | None = None
        self._has_seen_one = False
        self._worker: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._offered = False

    def run(self) -> None:
        """Show the icon until the person quits. A worker is started where none runs, and ended at the end.

        Raises:
            TrayRunsError: another tray of this person runs.
            NoTrayHostError: the desktop has no place for an icon.
        """
        self._places.make()
        lock = FileLock(self._places.runtime / "tray.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise TrayRunsError(
                "a tray of yours runs already; `swarmkit tray --open` opens its page"
            ) from None
        with ExitStack() as owned:
            owned.callback(lock.release)
            pid = self._places.runtime / TRAY_PID
            write_atomically(pid, str(os.getpid()).encode())
            owned.callback(pid.unlink, missing_ok=True)
            owned.callback(close_desktop_bus)
            owned.callback(self._end_worker)
            owned.enter_context(self._pages)
            self.start_worker()
            owned.callback(self._watch.stop)
            self._watch.start()
            watcher = _Requests(self._places, self.act)
            owned.callback(watcher.stop)
            watcher.start()
            self._host.run(self.act)

    def act(self, action: str) -> None:
        """Do what a click asks for, without making the desktop wait."""
        threading.Thread(target=self._act, args=(action,), name="swarmkit-tray-action", daemon=True).start()

    def open(self, page: str = "dashboard") -> None:
        """Open a page in the person's browser."""
        self._show_page(self._pages.link(page))

    def start_worker(self) -> None:
        """Start a worker as a process of the tray, unless one runs."""
        with self._starting:
            if self._client.runs or (self._worker is not None and self._worker.poll() is None):
                return
            program = ["swarmkit.cli", "worker", "run"]
            if sys.platform == "win32":
                program = ["swarmkit_app.tray.wsl_worker"]
            self._worker = subprocess.Popen(
                [sys.executable, "-m", *program],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self._watch.look()

    def _act(self, action: str) -> None:
        verb, _, of = action.partition(" ")
        try:
            if verb == "quit":
                self._host.stop()
            elif verb == "start":
                self.start_worker()
            elif verb == "resume":
                self._client.resume()
            elif verb == "pause":
                self._client.pause(*_pause(of))
            else:
                self.open(verb)
        except SwarmkitError as error:
            self._host.notify("swarmkit", str(error))
        self._watch.look()

    def _on_status(self, status: Status | None) -> None:
        if status is None and not self._has_seen_one:
            self._host.show(face_of(None))
            return  # it is still starting
        told = news(self._status, status) if self._has_seen_one else ""
        self._has_seen_one = True
        self._status = status
        self._host.show(face_of(status))
        if told:
            self._host.notify("swarmkit needs you", told)
        if status is not None and status.reason == "not_agreed" and not self._offered:
            self._offered = True
            self.open("wizard")

    def _end_worker(self) -> None:
        """End the worker that this tray has started; one that somebody else has started goes on."""
        worker = self._worker
        if worker is None or worker.poll() is not None:
            return
        if sys.platform == "win32":  # where to terminate is to kill
            with contextlib.suppress(SwarmkitError):
                self._client.stop()
        else:
            worker.terminate()
        try:
            worker.wait(_WORKER_ENDS_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait(5.0)


class DashboardHost:
    """In the place of an icon: says where the dashboard is, and waits."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self._say = say
        self._ended = threading.Event()
        self._title = ""

    def run(self, act: Callable[[str], None]) -> None:
        """See `TrayHost.run`."""
        act("dashboard")
        while not self._ended.wait(0.5):  # so that Ctrl-C is seen
            pass

    def show(self, face: TrayFace) -> None:
        """Say what has changed."""
        if face.title != self._title:
            self._title = face.title
            self._say(face.title)

    def notify(self, title: str, text: str) -> None:
        """Say it."""
        self._say(f"{title}: {text}")

    def stop(self) -> None:
        """See `TrayHost.stop`."""
        self._ended.set()


def open_running(places: WorkerPlaces, page: str) -> None:
    """Ask the tray that runs to open a page.

    Raises:
        UsageError: none runs.
    """
    lock = FileLock(places.runtime / "tray.lock")
    if places.runtime.exists():
        try:
            with lock.acquire(timeout=0):
                pass
        except Timeout:
            write_atomically(places.runtime / TRAY_REQUEST, page.encode())
            return
    raise UsageError("no tray of yours runs; start one with `swarmkit tray`")


class _Requests:
    """Looks for a request of another program of this person, to open a page or to quit: a file in a private
    folder.
    """

    def __init__(self, places: WorkerPlaces, act: Callable[[str], None]) -> None:
        self._path = places.runtime / TRAY_REQUEST
        self._act = act
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="swarmkit-tray-requests", daemon=True)

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_FOR_REQUEST_S):
            if not os.path.exists(self._path):  # noqa: PTH110 - four times as cheap, and asked all the time
                continue
            page = self._path.read_text(errors="replace")[:32]
            self._path.unlink(missing_ok=True)
            self._act(page if page in (QUIT, *PAGES) else "dashboard")


def host_here(kind: HostKind, on_no_panel: Callable[[], None]) -> TrayHost:
    """Return the best place for the icon on this desktop.

    Raises:
        NoTrayHostError: there is none of the kind that was asked for.
    """
    if kind == "none":
        return DashboardHost()
    if kind in ("auto", "pystray"):
        from swarmkit_app.tray.pystray_host import PystrayHost, has_app_indicator

        if kind == "pystray" or sys.platform != "linux" or has_app_indicator():
            return PystrayHost()
    if os.environ.get("DBUS_SESSION_BUS_ADDRESS") or kind == "status-notifier":
        from swarmkit_app.tray.status_notifier import StatusNotifierHost

        return StatusNotifierHost(on_no_panel)
    if kind == "auto":
        return DashboardHost()
    raise NoTrayHostError("there is no session's D-Bus")


def _pause(of: str) -> tuple[Until, float | None, Haste]:
    if of.isdigit():
        return "seconds", float(of), "prompt"
    if of == "now":
        return "resumed", None, "now"
    until: Until = "tomorrow" if of == "tomorrow" else "away" if of == "away" else "resumed"
    return until, None, "prompt"
