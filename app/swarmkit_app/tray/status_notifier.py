"""The tray icon of Linux desktops, over D-Bus: StatusNotifierItem with a com.canonical.dbusmenu.

Needs neither GTK nor anything else of the distribution. A panel that starts later, or again, finds the icon
too: whoever takes over the name of the watcher is told of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

from dbus_fast import BusType, Message, MessageType
from dbus_fast.aio import MessageBus

from swarmkit_app.tray.face import TrayFace
from swarmkit_app.tray.host import NoTrayHostError
from swarmkit_app.tray.status_notifier_services import MENU_PATH, NotifierItem, NotifierMenu

logger = logging.getLogger(__name__)

_WATCHER = "org.kde.StatusNotifierWatcher"
_ITEM_PATH = "/StatusNotifierItem"
_PANEL_WITHIN_S = 10.0


class StatusNotifierHost:
    """A `TrayHost` on the session's D-Bus.

    Args:
        on_no_panel: called once where no panel shows the icon after ten seconds. A panel that comes later
            still does.
    """

    def __init__(self, on_no_panel: Callable[[], None] | None = None) -> None:
        self._on_no_panel = on_no_panel
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._face: TrayFace | None = None
        self._bus: MessageBus | None = None
        self._item: NotifierItem | None = None
        self._menu: NotifierMenu | None = None
        self._is_shown = False
        self._stopped = False
        self._name = f"org.kde.StatusNotifierItem-{os.getpid()}-1"
        self._tasks: set[asyncio.Future[None]] = set()

    def run(self, act: Callable[[str], None]) -> None:
        """See `TrayHost.run`."""
        asyncio.run(self._run(act))

    def show(self, face: TrayFace) -> None:
        """See `TrayHost.show`."""
        self._face = face
        self._soon(self._show)

    def notify(self, title: str, text: str) -> None:
        """See `TrayHost.notify`."""
        self._soon(lambda: self._begin(self._notify(title, text)))

    def stop(self) -> None:
        """See `TrayHost.stop`."""
        self._stopped = True
        self._soon(self._end)

    # ------------------------------------------------------------------ on the event loop

    async def _run(self, act: Callable[[str], None]) -> None:
        self._ended = asyncio.Event()
        if self._stopped:
            return
        try:
            bus = self._bus = await MessageBus(bus_type=BusType.SESSION).connect()
        except Exception as error:
            raise NoTrayHostError(f"the session's D-Bus cannot be reached: {error}") from error
        self._item, self._menu = NotifierItem(act), NotifierMenu(act)
        self._loop = asyncio.get_running_loop()
        self._show()
        bus.export(_ITEM_PATH, self._item)
        bus.export(MENU_PATH, self._menu)
        await bus.request_name(self._name)
        bus.add_message_handler(self._on_message)
        await self._call(
            "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch", "s",
            f"type='signal',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg0='{_WATCHER}'",
        )  # fmt: skip
        panel = self._loop.call_later(_PANEL_WITHIN_S, self._look_for_panel)
        try:
            await self._register()
            lost = asyncio.ensure_future(bus.wait_for_disconnect())
            ended = asyncio.ensure_future(self._ended.wait())
            await asyncio.wait({lost, ended}, return_when=asyncio.FIRST_COMPLETED)
            was_lost = not self._ended.is_set()
            for task in (lost, ended):
                task.cancel()
            await asyncio.gather(lost, ended, return_exceptions=True)
            if was_lost:
                raise NoTrayHostError("the session's D-Bus has ended")
        finally:
            panel.cancel()
            self._loop = None
            bus.disconnect()

    async def _register(self) -> None:
        try:
            await self._call(
                _WATCHER, "/StatusNotifierWatcher", _WATCHER, "RegisterStatusNotifierItem", "s", self._name
            )
        except NoTrayHostError as error:
            logger.info("no panel shows the icon yet: %s", error)
        else:
            self._is_shown = True

    def _look_for_panel(self) -> None:
        if not self._is_shown and self._on_no_panel is not None:
            self._on_no_panel()

    def _on_message(self, message: Message) -> None:
        is_owner = message.message_type == MessageType.SIGNAL and message.member == "NameOwnerChanged"
        if is_owner and message.body and message.body[0] == _WATCHER and message.body[2]:
            self._begin(self._register())

    def _end(self) -> None:
        if self._ended is not None:
            self._ended.set()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _show(self) -> None:
        face, item, menu = self._face, self._item, self._menu
        if face is None or item is None or menu is None:
            return
        item.show(face)
        menu.show(face.menu)

    async def _notify(self, title: str, text: str) -> None:
        with contextlib.suppress(NoTrayHostError):  # a desktop without notifications has the icon's menu
            await self._call(
                "org.freedesktop.Notifications", "/org/freedesktop/Notifications",
                "org.freedesktop.Notifications", "Notify", "susssasa{sv}i",
                "swarmkit", 0, "dialog-warning", title, text, [], {}, -1,
            )  # fmt: skip

    async def _call(
        self, name: str, path: str, interface: str, member: str, signature: str, *body: Any
    ) -> list[Any]:
        assert self._bus is not None
        message = Message(
            destination=name, path=path, interface=interface, member=member, signature=signature,
            body=list(body),
        )  # fmt: skip
        try:
            answer = await asyncio.wait_for(self._bus.call(message), 5.0)
        except (TimeoutError, asyncio.TimeoutError, EOFError, OSError) as error:
            raise NoTrayHostError(f"{name} does not answer") from error
        if answer is None or answer.message_type == MessageType.ERROR:
            raise NoTrayHostError(f"{name}: {getattr(answer, 'error_name', 'no answer')}")
        return answer.body

    def _soon(self, function: Callable[[], Any]) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(function)
