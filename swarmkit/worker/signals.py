"""What can be sensed of a computer and of the person at it. None always means: not known."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Name = Annotated[str, Meta(max_length=256)]


class SessionSignals(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What only a program in the person's own session can tell, such as the tray. It comes with a lease."""

    idle_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """Seconds since the last input."""
    locked: bool | None = None
    """Whether the screen is locked, so that nobody uses the computer."""
    full_screen: Name | None = None
    """The program that fills the screen; empty if none does."""
    film: Name | None = None
    """The player that plays a film or music; empty if none does."""
    remote_session: bool | None = None
    """Whether somebody is here over the network."""
    notes: Annotated[tuple[Name, ...], Meta(max_length=32)] = ()
    """What could not be sensed, and why, in words."""


class GpuSignals(Struct, frozen=True, kw_only=True):
    """The GPU that the worker uses. What the worker itself does there is not counted as others'."""

    other_programs: tuple[str, ...] | None = None
    other_load: float | None = None
    """The share of time that other programs keep it busy, from 0 to 1."""
    temperature_c: float | None = None
    watts: float | None = None


class MachineSignals(Struct, frozen=True, kw_only=True):
    """What the worker can tell by itself. Its own load is not counted as others'."""

    on_battery: bool | None = None
    metered: bool | None = None
    online: bool | None = None
    going_to_sleep: bool = False
    other_cpu: float | None = None
    """The share of all processors that other programs use, from 0 to 1."""
    program: str | None = None
    """The first of the listed programs that runs; empty if none does."""
    gpu: GpuSignals | None = None
    """None where the worker computes on the CPU."""
    temperature_c: float | None = None
    """Of the processor."""
    disk_free_bytes: int | None = None
    month_bytes: int | None = None
    """What the worker has sent and received this month."""
    notes: tuple[str, ...] = ()
    """What could not be sensed, and why, in words."""
