"""What the tray shows of a worker: the icon, the title, and the menu. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swarmkit.sizes import format_data
from swarmkit.worker.control.values import NodeStatus, Status, Totals

Shape = Literal["serving", "working", "paused", "trouble"]
"""The icon. Each has a shape of its own, so that it is told apart without its colour."""

SERVING_STATES = ("starting", "serving", "working")


@dataclass(frozen=True)
class MenuItem:
    """One line of the menu.

    Attributes:
        action: what a click asks for; empty: the line only tells something.
        items: a menu inside it. A line without a label separates those around it.
    """

    label: str = ""
    action: str = ""
    items: tuple[MenuItem, ...] = ()

    @property
    def is_enabled(self) -> bool:
        """Whether it can be clicked or opened."""
        return bool(self.action or self.items)


SEPARATOR = MenuItem()

PAUSES = (
    MenuItem("For 15 minutes", "pause 900"),
    MenuItem("For 1 hour", "pause 3600"),
    MenuItem("Until tomorrow", "pause tomorrow"),
    MenuItem("Until I have been away for 30 minutes", "pause away"),
    MenuItem("Until I resume", "pause resumed"),
    MenuItem("At once, without waiting for sessions to move", "pause now"),
)


@dataclass(frozen=True)
class TrayFace:
    """All that a host shows. Equal faces need not be shown again.

    Attributes:
        click: the action of a click on the icon itself.
    """

    shape: Shape
    title: str
    menu: tuple[MenuItem, ...]
    click: str = "dashboard"


def face_of(status: Status | None) -> TrayFace:
    """Return what to show of a worker's state; None: no worker answers."""
    if status is None:
        menu = (
            MenuItem("Trouble: the worker does not run"),
            SEPARATOR,
            MenuItem("Start the worker", "start"),
            MenuItem("Show the log", "log"),
            MenuItem("Quit", "quit"),
        )
        return TrayFace("trouble", "swarmkit: the worker does not run", menu, click="start")
    lines = [MenuItem(status.words)]
    if status.reason == "not_agreed":
        lines.append(MenuItem("Choose what to lend …", "wizard"))
    elif served := _served(status.model, status.node):
        lines.append(MenuItem(served))
    lines.append(MenuItem(f"Today {_tokens(status.today)}, in all {_tokens(status.all)}"))
    lines.append(MenuItem(_data(status)))
    lines.append(SEPARATOR)
    if status.pause is not None:
        lines.append(MenuItem("Resume", "resume"))
    elif status.reason != "not_agreed":
        lines.append(MenuItem("Pause", items=PAUSES))
    lines += [
        MenuItem("Dashboard", "dashboard"),
        MenuItem("Settings", "settings"),
        MenuItem("Show the log", "log"),
        MenuItem("Quit", "quit"),
    ]
    return TrayFace(shape_of(status), f"swarmkit: {status.words}", tuple(lines))


def shape_of(status: Status) -> Shape:
    """Return the icon of a worker's state."""
    if status.state == "trouble" or status.troubles:
        return "trouble"
    if status.state == "working":
        return "working"
    return "serving" if status.state in SERVING_STATES else "paused"


def news(before: Status | None, after: Status | None) -> str:
    """Return what the person must be told now, in words; empty: nothing. Only trouble is worth it."""
    if after is None:
        return "The worker has ended by itself." if before is not None else ""
    known = before.troubles if before is not None else ()
    told = [trouble for trouble in after.troubles if trouble not in known]
    if not told and after.state == "trouble" and (before is None or before.state != "trouble"):
        told = [after.words]
    return "\n".join(told)


def count(number: float) -> str:
    """Return a number for people, such as 950, 12 thousand or 3.4 million."""
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.0f} {name}" if scaled >= 10 else f"{scaled:.1f} {name}"
    return f"{number:.0f}"


def _tokens(totals: Totals) -> str:
    return f"{count(totals.tokens)} tokens"


def _data(status: Status) -> str:
    used, most = format_data(status.month_bytes), status.allowance.month_bytes
    return f"{used} of {format_data(most)} used this month" if most is not None else f"{used} used this month"


def _served(model: str, node: NodeStatus | None) -> str:
    if node is None:
        return ""
    if node.blocks is None:
        return f"{model}: {node.progress or 'starting'}"
    start, stop = node.blocks
    text = f"{model}, blocks {start}:{stop}"
    if node.sessions:
        of = "1 session" if node.sessions == 1 else f"{node.sessions} sessions"
        text += f", {of}, {node.tokens_per_s:.1f} tokens/s"
    return text
