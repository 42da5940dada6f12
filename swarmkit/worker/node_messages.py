"""What the worker and its node process say to each other: one JSON object on each line.

::

    worker ── NodeOrder, then Replace and Leave ──> standard input of the node process
           <── NodeEvent, NodeReport, NodeFailed ── its standard output

When the standard input ends, the worker has ended, and the node process ends itself at once.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from swarmkit.worker.settings import Serve


class Runtime(Struct, frozen=True, kw_only=True):
    """Limits that can be replaced while the node process runs."""

    threads: int | None = None
    compute_share: float = 1.0
    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None


class NodeOrder(Struct, frozen=True, kw_only=True, tag="order"):
    """What the node process shall serve. It cannot be replaced: another order needs another process."""

    serve: Serve
    ram_bytes: int
    gpu_memory_share: float
    disk_bytes: int
    weights: str
    """The folder for weights."""
    identity: str
    """The file with the peer's key."""


class Replace(Struct, frozen=True, kw_only=True, tag="replace"):
    """Keep within other limits from now on."""

    runtime: Runtime


class Leave(Struct, frozen=True, kw_only=True, tag="leave"):
    """End, after the sessions have had some seconds to move away."""

    drain_s: float


class NodeEvent(Struct, frozen=True, kw_only=True, tag="event"):
    """Something has happened in the server, as its own event has it."""

    event: dict[str, Any]


class NodeReport(Struct, frozen=True, kw_only=True, tag="report"):
    """What the server does. The amounts count from the beginning of the process."""

    sessions: int
    """That are open."""
    sessions_begun: int
    tokens: int
    sent_bytes: int
    received_bytes: int
    gpu_bytes: int = 0


class NodeFailed(Struct, frozen=True, kw_only=True, tag="failed"):
    """It cannot go on, and ends. Said only where people can do something about it."""

    why: str
    """A sentence without its full stop."""


FromNode = NodeEvent | NodeReport | NodeFailed
ToNode = NodeOrder | Replace | Leave
