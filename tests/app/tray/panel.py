"""A desktop's panel for tests: it takes tray icons over D-Bus, reads their menus, and clicks."""

# No `from __future__ import annotations` here: dbus-fast reads the signatures from the annotations.

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from dbus_fast import Message, MessageType, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.annotations import DBusSignature, DBusStr
from dbus_fast.service import ServiceInterface, dbus_method

from tests.waiting import eventually

WATCHER = "org.kde.StatusNotifierWatcher"
_MENU = "com.canonical.dbusmenu"
_Nothing = Annotated[None, DBusSignature("")]


@contextmanager
def session_bus() -> Iterator[str]:
    """A session's D-Bus of its own; gives its address."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("needs dbus-daemon; Debian and Ubuntu have it as `apt-get install dbus`")
    daemon = subprocess.Popen(
        ["dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert daemon.stdout is not None
    try:
        yield daemon.stdout.readline().strip()
    finally:
        daemon.terminate()
        daemon.wait(10)
        daemon.stdout.close()


class _Watcher(ServiceInterface):
    def __init__(self) -> None:
        super().__init__(WATCHER)
        self.items: list[str] = []

    @dbus_method()
    def RegisterStatusNotifierItem(self, service: DBusStr) -> _Nothing:
        self.items.append(service)


@dataclass
class Row:
    """One line of a menu."""

    number: int
    label: str
    is_enabled: bool


class Panel:
    """A panel on a bus. `appear` lets it take icons."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._watcher = _Watcher()
        bus.export("/StatusNotifierWatcher", self._watcher)

    @classmethod
    async def on(cls, address: str) -> "Panel":
        return cls(await MessageBus(bus_address=address).connect())

    async def appear(self) -> None:
        await self._bus.request_name(WATCHER)

    async def icon(self) -> str:
        """Wait for an icon, and return its name on the bus."""
        await eventually(lambda: self._watcher.items, "a tray registers its icon")
        return self._watcher.items[-1]

    async def title(self, icon: str) -> str:
        found = await self._call(
            icon, "/StatusNotifierItem", "org.freedesktop.DBus.Properties", "Get", "ss",
            "org.kde.StatusNotifierItem", "Title",
        )  # fmt: skip
        return str(found[0].value)

    async def pixels(self, icon: str) -> list[list[Any]]:
        """The icon as width, height and ARGB, once for each size."""
        found = await self._call(
            icon, "/StatusNotifierItem", "org.freedesktop.DBus.Properties", "Get", "ss",
            "org.kde.StatusNotifierItem", "IconPixmap",
        )  # fmt: skip
        return list(found[0].value)

    async def menu(self, icon: str) -> list[Row]:
        """All lines of the menu, those inside of others too."""
        _, layout = await self._call(icon, "/MenuBar", _MENU, "GetLayout", "iias", 0, -1, [])
        return list(_rows(layout))

    async def click(self, icon: str, label: str) -> None:
        row = next(row for row in await self.menu(icon) if row.label == label)
        event = [row.number, "clicked", Variant("s", ""), 0]
        await self._call(icon, "/MenuBar", _MENU, "EventGroup", "a(isvu)", [event])

    async def close(self) -> None:
        self._bus.disconnect()
        await self._bus.wait_for_disconnect()

    async def _call(
        self, name: str, path: str, interface: str, member: str, signature: str, *body: Any
    ) -> list[Any]:
        message = Message(
            destination=name,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
        )
        answer = await asyncio.wait_for(self._bus.call(message), 30)
        assert answer is not None
        assert answer.message_type != MessageType.ERROR, (answer.error_name, answer.body)
        return list(answer.body)


def _rows(layout: list[Any]) -> Iterator[Row]:
    number, properties, inside = layout
    if number and "label" in properties:
        yield Row(number, properties["label"].value, properties["enabled"].value)
    for each in inside:
        yield from _rows(each.value)
