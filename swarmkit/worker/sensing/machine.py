"""What the worker senses by itself: power, load, listed programs, heat, network and disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.worker.process_tree import used_by
from swarmkit.worker.sensing.metered import metered
from swarmkit.worker.sensing.nvidia import NvidiaGpu
from swarmkit.worker.sensing.probes import Probe, UnknownError, ask_all, notes_of
from swarmkit.worker.signals import GpuSignals, MachineSignals


@dataclass(frozen=True)
class SensingOrder:
    """What is asked for.

    Attributes:
        own: processes that are ours; what they and all that they have started do is not others' doing.
        programs: names of programs at which the worker pauses.
        device: where the worker computes, such as `cuda:0`.
        weights: a folder on the disk that the weights are on.
    """

    own: tuple[int, ...]
    programs: tuple[str, ...]
    device: str
    weights: Path


class MachineSensing(Protocol):
    """Tells what a machine does; the tests have one that tells what they want."""

    def sense(self, order: SensingOrder) -> MachineSignals:
        """Return what is known now. Takes two seconds at most; called in a thread, one call at a time."""

    def limit_watts(self, watts: float | None) -> bool:
        """Set the GPU's power limit, or put back the usual one; returns whether the system allowed that."""


class OwnMachine:
    """Senses this computer."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._order = SensingOrder((), (), "cpu", Path("/"))
        self._load = OtherCpu(clock)
        self._gpu: NvidiaGpu | None = None
        self._probes: dict[str, Probe[object]] = {
            name: Probe(words, read, clock)
            for name, words, read in (
                ("on_battery", "battery", on_battery),
                ("metered", "metered connection", metered),
                ("online", "network", online),
                ("other_cpu", "load of other programs", lambda: self._load.since_last(self._order.own)),
                ("program", "listed programs", lambda: first_running(self._order.programs, self._order.own)),
                ("gpu", "GPU", self._gpu_signals),
                ("temperature_c", "temperature", temperature),
                ("disk_free_bytes", "disk", lambda: disk_free(self._order.weights)),
            )
        }

    def sense(self, order: SensingOrder) -> MachineSignals:
        """See `MachineSensing.sense`."""
        self._order = order
        ask_all(self._probes.values())
        values = {name: probe.value() for name, probe in self._probes.items()}
        return MachineSignals(**values, notes=notes_of(*self._probes.values()))  # type: ignore[arg-type]

    def limit_watts(self, watts: float | None) -> bool:
        """See `MachineSensing.limit_watts`."""
        return self._gpu is not None and self._gpu.set_watts(watts)

    def _gpu_signals(self) -> GpuSignals | None:
        if not self._order.device.startswith("cuda"):
            return None
        if self._gpu is None or self._gpu.device != self._order.device:
            self._gpu = NvidiaGpu(self._order.device)
        return self._gpu.signals(used_by(*self._order.own).pids)


class OtherCpu:
    """The share of all processors that others have used since it was asked last."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._last: tuple[float, float, float] | None = None

    def since_last(self, own: Sequence[int]) -> float | None:
        """Return a share from 0 to 1; None at the first call.

        Args: own: processes that do not count, nor all that they have started.
        """
        times = psutil.cpu_times()
        # What guests use is counted in `user` already.
        all_s = sum(times) - sum(getattr(times, name, 0.0) for name in ("guest", "guest_nice"))
        idle_s = sum(getattr(times, name, 0.0) for name in ("idle", "iowait"))
        now = all_s, all_s - idle_s, used_by(*own).cpu_s
        last, self._last = self._last, now
        if last is None or now[0] <= last[0]:
            return None
        total, busy, ours = (a - b for a, b in zip(now, last, strict=True))
        # A process of ours that has ended takes its past with it: then our part looks smaller than nothing.
        return min(1.0, max(0.0, busy - max(0.0, ours)) / total)


def on_battery() -> bool:
    """Whether the computer runs on its battery. One without a battery does not."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return False
    if battery.power_plugged is None:
        raise UnknownError("the system does not tell whether it is plugged in")
    return not battery.power_plugged


def online() -> bool:
    """Whether any network but loopback is up."""
    states = psutil.net_if_stats()
    addresses = psutil.net_if_addrs()
    return any(
        state.isup and any(not a.address.startswith(("127.", "::1", "fe80")) for a in addresses.get(name, ()))
        for name, state in states.items()
        if not name.startswith("lo")
    )


def first_running(programs: Collection[str], own: Sequence[int] = ()) -> str:
    """Return the name of the first process whose program is in a list; empty if none runs.

    Names are compared without regard to case, and to `.exe` at their end.
    """
    wanted = {_plain(name) for name in programs}
    if not wanted:
        return ""
    ours = used_by(*own).pids
    for process in psutil.process_iter(["name", "exe"]):
        names = {process.info["name"] or "", Path(process.info["exe"] or "").name}
        if process.pid not in ours and any(_plain(name) in wanted for name in names):
            return process.info["name"] or Path(process.info["exe"] or "").name
    return ""


def temperature() -> float | None:
    """The highest temperature of the processor, in °C; None on systems that have no way to tell."""
    read: Callable[[], dict[str, list[object]]] | None = getattr(psutil, "sensors_temperatures", None)
    found = read() if read is not None else {}
    processor = [
        reading.current  # type: ignore[attr-defined]
        for name, readings in found.items()
        if name in _PROCESSOR_SENSORS
        for reading in readings
    ]
    return max(processor, default=None)


def disk_free(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return psutil.disk_usage(str(folder)).free


_PROCESSOR_SENSORS = {"coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz", "soc_thermal"}


def _plain(name: str) -> str:
    name = name.casefold()
    return name.removesuffix(".exe") if sys.platform == "win32" or name.endswith(".exe") else name
