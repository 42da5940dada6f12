"""What the tray shows of a worker: the icon, the title, and the menu. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swarmkit.sizes import format_bytes, format_data
from swarmkit.worker.control.values import NodeStatus, Status, Totals
from swarmkit.worker.policy import Presence

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
    lines.append(MenuItem(f"Today {_given(status.today)}; in all {_given(status.all)}"))
    lines.append(MenuItem(_data(status)))
    lines.append(SEPARATOR)
    if status.pause is not None:
        lines.append(MenuItem("Resume", "resume"))
    elif status.reason != "not_agreed":
        lines.append(MenuItem("Pause", items=PAUSES))
    lines += [
        MenuItem("Limits that hold now", items=_limits(status)),
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


def _given(totals: Totals) -> str:
    sessions = "1 session" if totals.sessions == 1 else f"{count(totals.sessions)} sessions"
    return f"{count(totals.tokens)} tokens for {sessions}"


_PRESENCE: dict[Presence, str] = {
    "in use": "While you use the computer:",
    "away": "While you are away:",
    "unknown": "While it is not known whether you are there:",
}


def _limits(status: Status) -> tuple[MenuItem, ...]:
    """What may be used now, one line for each limit that is set."""
    allowed = status.allowance
    rates = (("Upload", allowed.upload_bytes_per_s), ("Download", allowed.download_bytes_per_s))
    words = [
        _PRESENCE[status.presence],
        f"Processor cores: {allowed.cpu_cores or 'all'}",
        f"Time to compute: {allowed.compute_share:.0%}",
        f"Memory: {format_bytes(allowed.ram_bytes)}",
        f"Memory of the GPU: {allowed.gpu_memory_share:.0%}",
        f"Power of the GPU: {allowed.gpu_watts:.0f} W" if allowed.gpu_watts is not None else "",
        f"Temperature: {allowed.temperature_c:.0f} °C",
        f"Disk for weights: {format_bytes(allowed.disk_bytes)}",
        *(f"{name}: {format_data(rate)}/s" for name, rate in rates if rate is not None),
    ]
    lines = tuple(MenuItem(text) for text in words if text)
    return (*lines, SEPARATOR, MenuItem("Change …", "settings"))


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
