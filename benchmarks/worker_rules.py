"""Rows of `worker_limits.py` with rules: what happens, and how soon the worker pauses for it."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from benchmarks.worker_bench import Bench, Measured, wait_for
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.handle import NoWorkerError
from swarmkit.worker.settings import DAYS
from swarmkit.worker.signals import SessionSignals
from swarmkit.worker.worker import LEASE_S

_SENSED_WITHIN_S = 2.5
"""The worker looks at its machine every two seconds."""
_AWAY = SessionSignals(idle_s=3600.0, locked=False, full_screen="", film="", remote_session=False)
_AWAY_AFTER_S = 10.0
_HOLDER = "bench"


def _paused(
    bench: Bench, name: str, reason: str, begin: Callable[[], object], sensed_s: float = 0.0
) -> Measured:
    """Have something happen at which the worker pauses, under load."""
    with bench.load():
        ended = bench.end(begin)
    status = bench.client.status()
    said = repr(status.words) if status.reason == reason else f"**{status.words!r}**"
    kept = status.reason == reason and ended.is_in_time(sensed_s)
    set_to = f"pause; sensed within {sensed_s:g} s" if sensed_s else "pause"
    return Measured(name, set_to, f"{ended}; {said}", kept)


# ---------------------------------------------------------------------- what the worker itself senses


def battery(bench: Bench) -> Measured:
    """The computer is unplugged."""
    bench.set_rules(on_battery=False)
    begin = functools.partial(bench.tell, on_battery=True)
    return _paused(bench, "battery (told)", "battery", begin, _SENSED_WITHIN_S)


def metered(bench: Bench) -> Measured:
    """The connection costs by the byte from now on."""
    bench.set_rules(on_metered=False)
    begin = functools.partial(bench.tell, metered=True)
    return _paused(bench, "metered line (told)", "metered", begin, _SENSED_WITHIN_S)


def gpu_program(bench: Bench) -> Measured:
    """Another program begins to use the GPU."""
    begin = functools.partial(bench.tell, gpu={"other_programs": ["blender"]})
    return _paused(bench, "another program on the GPU (told)", "gpu_program", begin, _SENSED_WITHIN_S)


def busy_gpu(bench: Bench) -> Measured:
    """Others keep the GPU busy."""
    name = "others on the GPU for 90 % of the time (told)"
    begin = functools.partial(bench.tell, gpu={"other_load": 0.9})
    return _paused(bench, name, "busy_gpu", begin, _SENSED_WITHIN_S)


def too_hot(bench: Bench) -> Measured:
    """The device is far hotter than it may be."""
    name = "a device of 120 °C (told; limit 110 °C)"
    begin = functools.partial(bench.tell, temperature_c=120.0)
    return _paused(bench, name, "too_hot", begin, _SENSED_WITHIN_S)


def program(bench: Bench) -> Measured:
    """A program with a name of its own starts, which is in the list."""
    game = bench.folder / "swarmkit-game"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", game)
    bench.set_rules(programs=[game.name])
    with _programs([str(game), "600"], 1) as start:
        return _paused(bench, "a listed program", "program", start, _SENSED_WITHIN_S)


def busy_cpu(bench: Bench) -> Measured:
    """Programs begin to compute on all processors. The client is another program, too."""
    bench.set_rules(busy_cpu={"in_use": 0.8, "away": 0.8})
    with _programs([sys.executable, "-c", "while True: pass"], os.cpu_count() or 1) as start:
        return _paused(bench, "busy processors (limit 80 %)", "busy_cpu", start, 2 * _SENSED_WITHIN_S)


@contextlib.contextmanager
def _programs(command: list[str], count: int) -> Iterator[Callable[[], object]]:
    """What starts some programs, which end with the `with` block."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        yield lambda: running.extend(subprocess.Popen(command) for _ in range(count))
    finally:
        for each in running:
            each.kill()
            each.wait()


def schedule(bench: Bench) -> Measured:
    """The hours of the schedule are over. That is not urgent: sessions have half a second to move away."""
    bench.client.change_settings({"drain_s": 0.5})
    closed = dict.fromkeys(DAYS, "." * 24)
    return _paused(bench, "schedule (no hours)", "schedule", lambda: bench.set_rules(schedule=closed))


def disk_free(bench: Bench) -> Measured:
    """The disk has less room than has to stay free."""
    begin = functools.partial(bench.set, disk_free_bytes=2**59)
    return _paused(bench, "free disk (more than there is)", "disk", begin, _SENSED_WITHIN_S)


# ---------------------------------------------------------------------- what a tray tells


class _Lease:
    """Renews a tray's lease every second, inside `with`."""

    def __init__(self, client: WorkerClient) -> None:
        self._client, self._signals = client, _AWAY
        self._one = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew)

    def __enter__(self) -> _Lease:
        self.tell(_AWAY)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lose()
        self._client.release_lease(_HOLDER)

    def tell(self, signals: SessionSignals) -> None:
        """Tell this from now on."""
        with self._one:
            self._signals = signals
            self._client.renew_lease(_HOLDER, signals)

    def lose(self) -> None:
        """Renew the lease no more."""
        self._ended.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._ended.wait(1.0):
            with contextlib.suppress(NoWorkerError), self._one:
                self._client.renew_lease(_HOLDER, self._signals)


@contextlib.contextmanager
def _at_a_desktop(bench: Bench) -> Iterator[_Lease]:
    """This program is the tray inside the `with` block; nobody is there."""
    with _Lease(bench.client) as lease:
        bench.set_rules(presence="desktop")
        try:
            yield lease
        finally:
            bench.set_rules(presence="headless")


def _told(name: str, reason: str, **signals: object) -> Callable[[Bench], Measured]:
    def measure(bench: Bench) -> Measured:
        with _at_a_desktop(bench) as lease:
            told = msgspec.structs.replace(_AWAY, **signals)
            return _paused(bench, f"{name} (told)", reason, lambda: lease.tell(told))

    return measure


in_use = _told("somebody comes back", "in_use", idle_s=0.0)
full_screen = _told("a program fills the screen", "full_screen", full_screen="doom")
film = _told("a film plays", "film", film="VLC media player")
remote_session = _told("somebody logs in from afar", "remote_session", remote_session=True)


def no_tray(bench: Bench) -> Measured:
    """The tray is killed, and renews its lease no more."""
    with _at_a_desktop(bench) as lease:
        return _paused(bench, "the tray is killed", "no_tray", lease.lose, LEASE_S + 1.0)


def absence(bench: Bench) -> Measured:
    """Somebody goes away; for how long nobody has touched anything when it begins to serve."""
    idle_s = 0.0
    with _at_a_desktop(bench) as lease:
        bench.set_rules(away_after_s=_AWAY_AFTER_S)
        lease.tell(msgspec.structs.replace(_AWAY, idle_s=idle_s))
        bench.wait("paused")
        began = time.monotonic()

        def begins() -> bool:
            nonlocal idle_s
            idle_s = time.monotonic() - began
            lease.tell(msgspec.structs.replace(_AWAY, idle_s=idle_s))
            return bench.client.status().node is not None

        wait_for(begins, "it begins to serve")
    return Measured(
        "only after an absence (told)",
        f"{_AWAY_AFTER_S:g} s",
        f"begins after {idle_s:.1f} s",
        idle_s >= _AWAY_AFTER_S,
    )


def in_use_or_away(bench: Bench) -> Measured:
    """A limit has one value while somebody uses the computer, and another one while nobody does."""
    with _at_a_desktop(bench) as lease:
        # The node now goes on while somebody is here: it plans its memory anew, for both values of the limit.
        rules = {"only_when_away": False}
        limits = {
            "cpu_cores": {"in_use": 1, "away": None},
            "ram_bytes": {"in_use": 4 * 2**30, "away": 8 * 2**30},
        }
        bench.begin_anew(lambda: bench.client.change_settings({"rules": rules, "limits": limits}))
        with bench.load():
            away = bench.cores_used()
            lease.tell(msgspec.structs.replace(_AWAY, idle_s=0.0))
            time.sleep(2.0)
            here = bench.cores_used()
    return Measured(
        "CPU cores while somebody is here (told), no limit else",
        "1",
        f"{here:.2f}",
        here <= 1.05,
        f"{away:.2f} while away",
    )
