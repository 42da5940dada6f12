"""What the tests of the worker share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from anyio.from_thread import start_blocking_portal

from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.values import Status
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.sensing.machine import MachineSensing, SensingOrder
from swarmkit.worker.signals import MachineSignals, SessionSignals
from swarmkit.worker.worker import BackgroundWorker
from tests.waiting import wait_until

PRETEND_NODE = (sys.executable, str(Path(__file__).with_name("pretend_node.py")))
_LOOK_S = 0.05
CALM = MachineSignals(on_battery=False, metered=False, online=True, other_cpu=0.0, program="")
AWAY = SessionSignals(idle_s=3600.0, locked=False, full_screen="", film="", remote_session=False)
HERE = msgspec.structs.replace(AWAY, idle_s=0.0)


class SaidMachine:
    """Senses what the test says."""

    def __init__(self) -> None:
        self.signals = CALM
        self.watts: float | None = None
        self.orders: list[SensingOrder] = []

    def sense(self, order: SensingOrder) -> MachineSignals:
        self.orders.append(order)
        return self.signals

    def limit_watts(self, watts: float | None) -> bool:
        self.watts = watts
        return False

    def say(self, **signals: Any) -> None:
        """From the next look on, these differ from a calm machine's."""
        self.signals = msgspec.structs.replace(CALM, **signals)


class RunningWorker:
    """A worker on an event loop of its own, and a client of it."""

    def __init__(self, places: WorkerPlaces, machine: MachineSensing, **options: Any) -> None:
        options.setdefault("node_command", PRETEND_NODE)
        self.places = places
        self.client = WorkerClient(places)
        self._owned = ExitStack()
        self._portal = self._owned.enter_context(start_blocking_portal())
        self.worker = BackgroundWorker(places, sensing=machine, **options)
        try:
            self._running, _ = self._portal.start_task(self.worker.run)
        except BaseException:
            self._owned.close()
            raise

    def status(self) -> Status:
        return self.client.status()

    def serve(self, serve: str | dict[str, Any] = "quick", **changes: Any) -> None:
        """Choose to serve without a desktop."""
        rules = {"presence": "headless", **changes.pop("rules", {})}
        serve = {"model": serve} if isinstance(serve, str) else serve
        self.client.change_settings({"agreed": True, "serve": serve, "rules": rules, **changes})

    def wait_for(self, *states: str) -> Status:
        what = f"the worker is {' or '.join(states)}"
        wait_until(lambda: self.status().state in states, what, every=_LOOK_S)
        return self.status()

    def wait_until(self, holds: Callable[[Status], object], what: str) -> Status:
        wait_until(lambda: holds(self.status()), what, every=_LOOK_S)
        return self.status()

    def close(self) -> None:
        """End the worker. May be called twice."""
        if self._running.done():
            return
        self._portal.call(self.worker.stop)
        self._portal.call(self.worker.skip_drain)
        try:
            self._running.result(30)
        finally:
            self._owned.close()


@contextmanager
def not_ours(*command: str | Path) -> Iterator[int]:
    """Run a program that counts as somebody else's, for its parent has ended; its process id."""
    shell = ["sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", *command]
    pid = int(subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=True).stdout)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
