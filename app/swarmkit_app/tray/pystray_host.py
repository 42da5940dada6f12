"""The tray icon of Windows, of macOS, and of Linux where the distribution's AppIndicator is at hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from swarmkit_app.tray.face import MenuItem, TrayFace
from swarmkit_app.tray.host import NoTrayHostError
from swarmkit_app.tray.icons import icon


class PystrayHost:
    """A `TrayHost` over pystray. On macOS `run` has to be called in the main thread.

    Raises:
        NoTrayHostError: pystray finds no way to show an icon here.
    """

    def __init__(self) -> None:
        try:
            import pystray
        except Exception as error:  # it looks for a display while it is imported
            raise NoTrayHostError(f"pystray cannot be used here: {error}") from error
        self._pystray: Any = pystray
        self._act: Callable[[str], None] = lambda _: None
        self._face = TrayFace("paused", "swarmkit", ())
        self._icon: Any = pystray.Icon("swarmkit", icon("paused"), "swarmkit", pystray.Menu(self._items))
        self._is_up = False
        self._stopped = False

    def run(self, act: Callable[[str], None]) -> None:
        """See `TrayHost.run`."""
        self._act = act
        if self._stopped:
            return
        try:
            self._icon.run(self._set_up)
        except Exception as error:
            raise NoTrayHostError(f"the icon cannot be shown: {error}") from error

    def show(self, face: TrayFace) -> None:
        """See `TrayHost.show`."""
        self._face = face
        if self._is_up:
            self._icon.icon = icon(face.shape)
            self._icon.title = face.title[:127]  # Windows takes no more
            self._icon.update_menu()

    def notify(self, title: str, text: str) -> None:
        """See `TrayHost.notify`."""
        if self._is_up:
            with contextlib.suppress(NotImplementedError):  # not every desktop has notifications
                self._icon.notify(text, title)

    def stop(self) -> None:
        """See `TrayHost.stop`."""
        self._stopped = True
        if self._is_up:
            self._icon.stop()

    def _set_up(self, shown: Any) -> None:
        shown.visible = True
        self._is_up = True
        if self._stopped:
            shown.stop()
        else:
            self.show(self._face)

    def _items(self) -> Iterator[Any]:
        for number, item in enumerate(self._face.menu):
            yield self._item(item, is_default=number == 0)

    def _item(self, item: MenuItem, is_default: bool = False) -> Any:
        make, menu = self._pystray.MenuItem, self._pystray.Menu
        if not item.label:
            return menu.SEPARATOR
        if item.items:
            return make(item.label, menu(*map(self._item, item.items)))
        action = item.action or (self._face.click if is_default else "")
        return make(item.label, lambda: self._act(action), default=is_default, enabled=bool(action))


def has_app_indicator() -> bool:
    """Whether this Python finds the distribution's GTK and AppIndicator, which pystray then uses."""
    try:
        import gi

        for name in ("AyatanaAppIndicator3", "AppIndicator3"):
            with contextlib.suppress(ValueError):
                gi.require_version(name, "0.1")
                return True
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it is of no use
        return False
    return False
