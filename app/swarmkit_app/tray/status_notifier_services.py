"""The two objects that Linux panels read over D-Bus: the icon and its menu.

The names and signatures are those of the StatusNotifierItem and com.canonical.dbusmenu interfaces.
"""
# No `from __future__ import annotations` here: dbus-fast reads the signatures from the annotations.

from collections.abc import Callable
from typing import Annotated, Any

from dbus_fast import PropertyAccess, Variant
from dbus_fast.annotations import (
    DBusBool,
    DBusInt32,
    DBusObjectPath,
    DBusSignature,
    DBusStr,
    DBusUInt32,
    DBusVariant,
)
from dbus_fast.service import ServiceInterface, dbus_method, dbus_property, dbus_signal
from PIL import Image

from swarmkit_app.tray.face import MenuItem, Shape, TrayFace
from swarmkit_app.tray.icons import icon

MENU_PATH = "/MenuBar"
_SIDES = (22, 32, 48)
_ROOT = 0

Pixmaps = Annotated[list[list[Any]], DBusSignature("a(iiay)")]
ToolTip = Annotated[list[Any], DBusSignature("(sa(iiay)ss)")]
Names = Annotated[list[str], DBusSignature("as")]
Numbers = Annotated[list[int], DBusSignature("ai")]
TwoNumbers = Annotated[list[list[int]], DBusSignature("aiai")]
Layout = Annotated[list[Any], DBusSignature("u(ia{sv}av)")]
ManyProperties = Annotated[list[list[Any]], DBusSignature("a(ia{sv})")]
Events = Annotated[list[list[Any]], DBusSignature("a(isvu)")]
LayoutChange = Annotated[list[int], DBusSignature("ui")]
Nothing = Annotated[None, DBusSignature("")]
PropertyChanges = Annotated[list[Any], DBusSignature("a(ia{sv})a(ias)")]


class NotifierItem(ServiceInterface):
    """The icon."""

    def __init__(self, act: Callable[[str], None]) -> None:
        super().__init__("org.kde.StatusNotifierItem")
        self._act = act
        self._title = "swarmkit"
        self._click = "dashboard"
        self._status = "Active"
        self._pixmaps: list[list[Any]] = []

    def show(self, face: TrayFace) -> None:
        """Show it, and tell panels what has changed."""
        self._click = face.click
        pixmaps = [_pixmap(face.shape, side) for side in _SIDES]
        if pixmaps != self._pixmaps:
            self._pixmaps = pixmaps
            self.NewIcon()
        status = "NeedsAttention" if face.shape == "trouble" else "Active"
        if status != self._status:
            self._status = status
            self.NewStatus()
        if face.title != self._title:
            self._title = face.title
            self.NewTitle()
            self.NewToolTip()

    @dbus_property(access=PropertyAccess.READ)
    def Category(self) -> DBusStr:
        return "ApplicationStatus"

    @dbus_property(access=PropertyAccess.READ)
    def Id(self) -> DBusStr:
        return "swarmkit"

    @dbus_property(access=PropertyAccess.READ)
    def Title(self) -> DBusStr:
        return self._title

    @dbus_property(access=PropertyAccess.READ)
    def Status(self) -> DBusStr:
        return self._status

    @dbus_property(access=PropertyAccess.READ)
    def WindowId(self) -> DBusInt32:
        return 0

    @dbus_property(access=PropertyAccess.READ)
    def IconName(self) -> DBusStr:
        return ""

    @dbus_property(access=PropertyAccess.READ)
    def IconPixmap(self) -> Pixmaps:
        return self._pixmaps

    @dbus_property(access=PropertyAccess.READ)
    def AttentionIconName(self) -> DBusStr:
        return ""

    @dbus_property(access=PropertyAccess.READ)
    def AttentionIconPixmap(self) -> Pixmaps:
        return self._pixmaps

    @dbus_property(access=PropertyAccess.READ)
    def OverlayIconName(self) -> DBusStr:
        return ""

    @dbus_property(access=PropertyAccess.READ)
    def ToolTip(self) -> ToolTip:
        return ["", [], self._title, ""]

    @dbus_property(access=PropertyAccess.READ)
    def ItemIsMenu(self) -> DBusBool:
        return False

    @dbus_property(access=PropertyAccess.READ)
    def Menu(self) -> DBusObjectPath:
        return MENU_PATH

    @dbus_method()
    def Activate(self, x: DBusInt32, y: DBusInt32) -> Nothing:
        self._act(self._click)

    @dbus_method()
    def SecondaryActivate(self, x: DBusInt32, y: DBusInt32) -> Nothing:
        self._act(self._click)

    @dbus_method()
    def ContextMenu(self, x: DBusInt32, y: DBusInt32) -> Nothing:
        """The panel shows the menu by itself."""

    @dbus_method()
    def Scroll(self, delta: DBusInt32, orientation: DBusStr) -> Nothing:
        """Nothing here scrolls."""

    @dbus_signal()
    def NewIcon(self) -> Nothing:
        return None

    @dbus_signal()
    def NewTitle(self) -> Nothing:
        return None

    @dbus_signal()
    def NewToolTip(self) -> Nothing:
        return None

    @dbus_signal()
    def NewStatus(self) -> DBusStr:
        return self._status


class NotifierMenu(ServiceInterface):
    """The menu. Its lines are numbered in the order in which they are shown; 0 is the menu itself."""

    def __init__(self, act: Callable[[str], None]) -> None:
        super().__init__("com.canonical.dbusmenu")
        self._act = act
        self._revision = 1
        self._lines: dict[int, MenuItem] = {_ROOT: MenuItem()}
        self._inside: dict[int, list[int]] = {_ROOT: []}

    def show(self, menu: tuple[MenuItem, ...]) -> None:
        """Show it, and tell panels if it has changed."""
        before = self._lines[_ROOT].items
        if menu == before:
            return
        self._lines, self._inside = {}, {}
        self._number(MenuItem(items=menu))
        self._revision += 1
        self.LayoutUpdated()

    def _number(self, item: MenuItem) -> int:
        number = len(self._lines)
        self._lines[number] = item
        self._inside[number] = []
        self._inside[number] = [self._number(each) for each in item.items]
        return number

    def _properties(self, number: int) -> dict[str, Variant]:
        item = self._lines[number]
        if number == _ROOT:
            return {"children-display": Variant("s", "submenu")}
        if not item.label:
            return {"type": Variant("s", "separator")}
        label = item.label.replace("_", "__")  # one underscore would mark the key of a shortcut
        found = {"label": Variant("s", label), "enabled": Variant("b", item.is_enabled)}
        if item.items:
            found["children-display"] = Variant("s", "submenu")
        return found

    def _layout(self, number: int, depth: int) -> list[Any]:
        inside = self._inside[number] if depth else []
        return [
            number,
            self._properties(number),
            [Variant("(ia{sv}av)", self._layout(each, depth - 1)) for each in inside],
        ]

    def _on_event(self, number: int, kind: str) -> bool:
        item = self._lines.get(number)
        if item is not None and kind == "clicked" and item.action:
            self._act(item.action)
        return item is not None

    @dbus_property(access=PropertyAccess.READ)
    def Version(self) -> DBusUInt32:
        return 3

    @dbus_property(access=PropertyAccess.READ)
    def Status(self) -> DBusStr:
        return "normal"

    @dbus_property(access=PropertyAccess.READ)
    def TextDirection(self) -> DBusStr:
        return "ltr"

    @dbus_property(access=PropertyAccess.READ)
    def IconThemePath(self) -> Names:
        return []

    @dbus_method()
    def GetLayout(self, parent: DBusInt32, depth: DBusInt32, names: Names) -> Layout:
        return [self._revision, self._layout(parent if parent in self._lines else _ROOT, depth)]

    @dbus_method()
    def GetGroupProperties(self, ids: Numbers, names: Names) -> ManyProperties:
        return [[number, self._properties(number)] for number in ids or self._lines if number in self._lines]

    @dbus_method()
    def GetProperty(self, number: DBusInt32, name: DBusStr) -> DBusVariant:
        return self._properties(number if number in self._lines else _ROOT).get(name, Variant("s", ""))

    @dbus_method()
    def Event(self, number: DBusInt32, kind: DBusStr, data: DBusVariant, timestamp: DBusUInt32) -> Nothing:
        self._on_event(number, kind)

    @dbus_method()
    def EventGroup(self, events: Events) -> Numbers:
        return [number for number, kind, _, _ in events if not self._on_event(number, kind)]

    @dbus_method()
    def AboutToShow(self, number: DBusInt32) -> DBusBool:
        return False

    @dbus_method()
    def AboutToShowGroup(self, ids: Numbers) -> TwoNumbers:
        return [[], [number for number in ids if number not in self._lines]]

    @dbus_signal()
    def LayoutUpdated(self) -> LayoutChange:
        return [self._revision, _ROOT]

    @dbus_signal()
    def ItemsPropertiesUpdated(self) -> PropertyChanges:
        return [[], []]


def _pixmap(shape: Shape, side: int) -> list[Any]:
    """The icon as ARGB in network byte order, as the protocol wants it."""
    red, green, blue, alpha = icon(shape, side).split()
    return [side, side, Image.merge("RGBA", (alpha, red, green, blue)).tobytes()]
