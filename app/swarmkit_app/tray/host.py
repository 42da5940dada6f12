"""What every place for the tray on a desktop can do, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from swarmkit.errors import SwarmkitError
from swarmkit_app.tray.face import TrayFace


class NoTrayHostError(SwarmkitError):
    """This desktop has no place for a tray icon, or none that can be reached."""


class TrayHost(Protocol):
    """Puts a face on the desktop. All methods but `run` may be called from any thread."""

    def run(self, act: Callable[[str], None]) -> None:
        """Show the icon, and call `act` with the action of each click, until `stop`.

        Raises:
            NoTrayHostError: there is no place for it.
        """

    def show(self, face: TrayFace) -> None:
        """Replace what is shown. May be called before `run`."""

    def notify(self, title: str, text: str) -> None:
        """Tell the person something."""

    def stop(self) -> None:
        """Take the icon away, and let `run` return."""
