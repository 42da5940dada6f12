"""What a worker's control API answers, as typed values. `docs/worker.md` describes each."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from swarmkit.worker.pause import Pause
from swarmkit.worker.policy import Allowance, Presence
from swarmkit.worker.signals import SessionSignals

State = Literal["paused", "starting", "serving", "working", "stopping", "trouble"]
"""`serving`: clients can use it, and none does; `working`: one does."""


class LeaseRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tray says that it is there, and what it senses. It has to say so again before the lease ends."""

    holder: Annotated[str, Meta(min_length=1, max_length=64)]
    """Names the tray; two that run at once are told apart by it."""
    signals: SessionSignals
    pid: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    """Of the tray, whose load is not that of others."""


class LeaseGranted(Struct, frozen=True, kw_only=True):
    """The lease of a tray."""

    seconds: float
    """How long it holds from now on."""


class Totals(Struct, frozen=True, kw_only=True):
    """What was contributed in some time."""

    tokens: int = 0
    """Positions of sessions (rows x tokens) that were computed, each through all blocks that are here."""
    sessions: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    serving_s: float = 0.0
    """How long clients could use this computer."""
    working_s: float = 0.0
    """How long at least one client did."""


class Day(Struct, frozen=True, kw_only=True):
    """One day of the history."""

    date: str
    """Such as 2026-11-28, by the computer's local time."""
    totals: Totals


class Stats(Struct, frozen=True, kw_only=True):
    """What was contributed."""

    today: Totals
    month: Totals
    all: Totals
    month_bytes_limit: int | None


class NodeStatus(Struct, frozen=True, kw_only=True):
    """The node process."""

    pid: int
    blocks: tuple[int, int] | None = None
    peer_id: str = ""
    addresses: tuple[str, ...] = ()
    progress: str = ""
    """What it does until it serves, in words."""
    sessions: int = 0
    tokens_per_s: float = 0.0
    cpu_cores: float = 0.0
    """How many cores its processes have used lately."""
    ram_bytes: int = 0
    gpu_bytes: int = 0
    compute_share: float = 1.0
    """The share of time in which it may compute: the limit's, or less while the device is hot."""


class LeaseStatus(Struct, frozen=True, kw_only=True):
    """The tray that is there."""

    holder: str
    seconds: float
    signals: SessionSignals


class Status(Struct, frozen=True, kw_only=True):
    """All that a face shows."""

    state: State
    reason: str
    """For programs: one of `policy.Reason`, or `starting`, `stopping`, `failed`, `over_limit`."""
    words: str
    """For people, such as "Paused: on battery"."""
    until: float | None
    """Unix time at which this changes by itself, as far as that is known."""
    presence: Presence
    pause: Pause | None
    """The person's own pause."""
    allowance: Allowance
    """The limits that hold now."""
    model: str
    node: NodeStatus | None
    lease: LeaseStatus | None
    today: Totals
    all: Totals
    month_bytes: int
    disk_bytes: int
    """What the weights take."""
    troubles: tuple[str, ...]
    """What the person should know, in words: settings that could not be read, a node that fails, …"""
    notes: tuple[str, ...]
    """What cannot be sensed here, and why."""
    restarts: int
    """How often the node process has failed in a row."""
    retry_at: float | None
    """Unix time of the next attempt to start it, after a failure."""
    pid: int
    """Of the worker."""
    version: str


BelongingKind = Literal[
    "weights", "settings", "identity", "history", "log", "running", "startup", "desktop", "program", "other"
]
"""`running` ends with worker and tray: locks, socket and token; `program` is what an installer made."""


class Belonging(Struct, frozen=True, kw_only=True):
    """Something that swarmkit has put on this computer, which its removal takes away."""

    kind: BelongingKind
    what: str
    """The kind in words."""
    path: str
    """A file, or a folder that belongs to swarmkit with all that is in it."""
    size_bytes: int


class Belongings(Struct, frozen=True, kw_only=True):
    """All that swarmkit has put on this computer for this person."""

    parts: tuple[Belonging, ...]
    size_bytes: int
