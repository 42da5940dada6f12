"""A whole small desktop on a screen that nobody sees: X server, session bus, window manager, panel, notices.

What stands on its screen can be looked at and clicked as a person would do it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from swarmkit_app.tray.face import Shape

from tests.waiting import wait_until
from tests.worker.desktops import missing, x_server

if TYPE_CHECKING:
    from PIL import Image

PROGRAMS = ("Xvfb", "dbus-daemon", "openbox", "xfce4-panel", "xdotool", "dunst")
WIDTH, HEIGHT = 900, 520
_PANEL_HEIGHT = 36
_LEAST_PIXELS, _BLENDED = 8, 12
"""So many pixels of a state's colour make its icon; each may differ so much, for it is small, and scaled."""

COLOURS: dict[Shape, tuple[int, int, int]] = {
    "serving": (0x2F, 0x9E, 0x44),
    "working": (0x19, 0x71, 0xC2),
    "paused": (0x86, 0x8E, 0x96),
    "trouble": (0xE0, 0x31, 0x31),
}

_PANEL = """<?xml version="1.0" encoding="UTF-8"?>
<channel name="xfce4-panel" version="1.0">
  <property name="configver" type="int" value="2"/>
  <property name="panels" type="array"><value type="int" value="1"/>
    <property name="panel-1" type="empty">
      <property name="position" type="string" value="p=8;x={x};y={y}"/>
      <property name="length" type="uint" value="100"/>
      <property name="position-locked" type="bool" value="true"/>
      <property name="size" type="uint" value="{height}"/>
      <property name="plugin-ids" type="array">
        <value type="int" value="1"/><value type="int" value="2"/>
      </property>
    </property>
  </property>
  <property name="plugins" type="empty">
    <property name="plugin-1" type="string" value="separator">
      <property name="expand" type="bool" value="true"/>
    </property>
    <property name="plugin-2" type="string" value="systray">
      <property name="square-icons" type="bool" value="true"/>
    </property>
  </property>
</channel>
"""


_FULL_SCREEN = """
import sys
from Xlib import Xatom, display
screen = display.Display()
root = screen.screen().root
window = root.create_window(0, 0, 300, 200, 0, screen.screen().root_depth)
state = [screen.get_atom("_NET_WM_STATE_FULLSCREEN")]
window.change_property(screen.get_atom("_NET_WM_STATE"), Xatom.ATOM, 32, state)
window.map()
screen.sync()
sys.stdin.read()
"""


def why_not() -> str:
    """Why there can be no desktop here; empty if there can."""
    return missing(*PROGRAMS)


class SeenDesktop:
    """A desktop that runs. Programs on it are started with `environment`."""

    def __init__(self, display: str, environment: Mapping[str, str]) -> None:
        from Xlib import display as x_display

        self.environment = dict(environment)
        self._display = x_display.Display(display)

    def close(self) -> None:
        self._display.close()

    def paint(self, colour: int) -> None:
        """Give the desktop behind all windows a colour."""
        root = self._display.screen().root
        root.change_attributes(background_pixel=colour)
        root.clear_area()
        self._display.sync()

    def picture(self) -> Image.Image:
        """What stands on the screen now."""
        from PIL import Image
        from Xlib import X

        root = self._display.screen().root
        seen = root.get_image(0, 0, WIDTH, HEIGHT, X.ZPixmap, 0xFFFFFFFF)
        return Image.frombytes("RGB", (WIDTH, HEIGHT), seen.data, "raw", "BGRX")

    def keep(self, name: str) -> None:
        """Write a picture of the screen to build/screenshots."""
        folder = Path("build/screenshots")
        folder.mkdir(parents=True, exist_ok=True)
        self.picture().save(folder / f"desktop-{name}.png")

    def icon(self, shape: Shape) -> tuple[int, int] | None:
        """The middle of the panel's icon of a state; None where it is not there."""
        panel = np.asarray(self.picture(), dtype=int)[-_PANEL_HEIGHT:]
        rows, columns = np.nonzero((abs(panel - COLOURS[shape]) <= _BLENDED).all(axis=2))
        if len(rows) < _LEAST_PIXELS:
            return None
        return int(columns.mean()), int(rows.mean()) + HEIGHT - _PANEL_HEIGHT

    def wait_for_icon(self, shape: Shape) -> tuple[int, int]:
        wait_until(lambda: self.icon(shape), f"the panel shows the icon of {shape!r}", every=0.2)
        found = self.icon(shape)
        assert found is not None
        return found

    def click(self, place: tuple[int, int], button: int = 1) -> None:
        self.do("mousemove", str(place[0]), str(place[1]), "click", str(button))

    def open_menu(self, shape: Shape) -> None:
        """Click with the right button on the icon, and wait until the menu has appeared."""
        place = self.wait_for_icon(shape)
        before = self._windows()
        self.click(place, button=3)
        wait_until(lambda: self._windows() > before, "the menu appears", every=0.1)
        time.sleep(0.5)  # it is drawn, and takes the keyboard

    def press(self, *keys: str) -> None:
        """Press keys one after the other, as slowly as a person."""
        self.do("key", "--delay", "150", *keys)

    def do(self, *words: str) -> str:
        """Have xdotool do something."""
        done = subprocess.run(
            ["xdotool", *words], env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout

    @contextmanager
    def full_screen_program(self) -> Iterator[None]:
        """A program whose window fills the screen, as the window manager makes it."""
        command = [sys.executable, "-c", _FULL_SCREEN]
        with subprocess.Popen(command, env=self.environment, stdin=subprocess.PIPE) as game:
            try:
                yield
            finally:
                game.communicate()

    def notices(self) -> int:
        """How many windows with notices stand on the screen."""
        found = 0
        for window in self._display.screen().root.query_tree().children:
            try:
                seen = window.get_attributes().map_state == 2 and "Dunst" in (window.get_wm_class() or ())
            except Exception:  # noqa: BLE001 - it has just been closed
                continue
            found += seen
        return found

    def _windows(self) -> int:
        """How many windows can be seen."""
        seen = 0
        for window in self._display.screen().root.query_tree().children:
            try:
                seen += window.get_attributes().map_state == 2
            except Exception:  # noqa: BLE001, PERF203 - it has just been closed
                continue
        return seen


@contextmanager
def seen_desktop(home: Path) -> Iterator[SeenDesktop]:
    """Run a desktop whose settings lie in a folder. Whatever was started for it is ended."""
    folder = home / "config" / "xfce4" / "xfconf" / "xfce-perchannel-xml"
    folder.mkdir(parents=True, exist_ok=True)
    where = {"x": WIDTH // 2, "y": HEIGHT - _PANEL_HEIGHT // 2, "height": _PANEL_HEIGHT}
    (folder / "xfce4-panel.xml").write_text(_PANEL.format(**where))
    with ExitStack() as owned:
        display = owned.enter_context(x_server(f"{WIDTH}x{HEIGHT}x24"))
        names = {"config": "XDG_CONFIG_HOME", "cache": "XDG_CACHE_HOME", "data": "XDG_DATA_HOME"}
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("WAYLAND")},
            **{variable: str(home / name) for name, variable in names.items()},
            "HOME": str(home),
            "DISPLAY": display,
            "XDG_SESSION_TYPE": "x11",
            "NO_AT_BRIDGE": "1",
            "GDK_BACKEND": "x11",
        }
        bus = _run(owned, environment, "dbus-daemon", "--session", "--nofork", "--print-address=1", say=True)
        environment["DBUS_SESSION_BUS_ADDRESS"] = bus.stdout.readline().strip()
        _run(owned, environment, "openbox")
        _run(owned, environment, "dunst")
        _run(owned, environment, "xfce4-panel", "--disable-wm-check")
        desktop = SeenDesktop(display, environment)
        owned.callback(desktop.close)
        yield desktop


def _run(owned: ExitStack, environment: Mapping[str, str], *command: str, say: bool = False) -> Any:
    program = subprocess.Popen(
        [shutil.which(command[0]) or command[0], *command[1:]],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if say else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def end() -> None:
        program.terminate()
        try:
            program.wait(10)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait(10)
        if program.stdout is not None:
            program.stdout.close()

    owned.callback(end)
    return program
