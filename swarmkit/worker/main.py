"""The worker as a program: its log, its signals, and its end."""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import signal
import sys
from collections.abc import Sequence
from typing import Any

import anyio

from swarmkit.errors import unwrapped
from swarmkit.worker.node_supervisor import NODE_COMMAND
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.sensing.dbus import close_desktop_bus
from swarmkit.worker.sensing.machine import MachineSensing
from swarmkit.worker.sensing.sleep import LogindSleepWatch
from swarmkit.worker.worker import BackgroundWorker

_LOG_BYTES = 2 * 2**20
_LOG_FILES = 3


def run_worker(
    places: WorkerPlaces | None = None,
    *,
    loopback: bool = False,
    verbose: bool = False,
    node_command: Sequence[str] = NODE_COMMAND,
    sensing: MachineSensing | None = None,
) -> None:
    """Run a worker until SIGINT or SIGTERM, or until it is told to stop. A second signal asks for haste.

    Args:
        loopback: listen on loopback also where there are Unix sockets.
        verbose: show the log as well.
        node_command: starts a node process.
        sensing: tells what the machine does; this machine's own signals if not given.

    Raises:
        WorkerRunsError: another worker of this person runs.
    """
    places = places or WorkerPlaces.of_this_person()
    places.make()
    handler = log_to(places, verbose)
    try:
        with unwrapped():
            anyio.run(_run, places, loopback, node_command, sensing)
    finally:
        close_desktop_bus()
        handler.close()


async def _run(
    places: WorkerPlaces, loopback: bool, node_command: Sequence[str], sensing: MachineSensing | None
) -> None:
    worker = BackgroundWorker(
        places,
        sensing=sensing,
        sleep_watch=LogindSleepWatch(),
        node_command=node_command,
        loopback=loopback,
    )
    loop, asked = asyncio.get_running_loop(), False

    def ask(*_: Any) -> None:
        nonlocal asked
        if asked:
            loop.call_soon_threadsafe(worker.skip_drain)
        asked = True
        loop.call_soon_threadsafe(worker.stop)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        await worker.run()
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def log_to(places: WorkerPlaces, verbose: bool, most_bytes: int = _LOG_BYTES) -> logging.Handler:
    """Write the worker's log from now on, which is rotated; a full disk must not end the worker.

    Args: most_bytes: of each of its files.
    """
    logging.raiseExceptions = False
    handler = logging.handlers.RotatingFileHandler(
        places.log, maxBytes=most_bytes, backupCount=_LOG_FILES, encoding="utf-8", delay=True
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    ours = logging.getLogger("swarmkit.worker")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    ours.propagate = False
    if verbose or sys.stderr.isatty():
        shown = logging.StreamHandler()
        shown.setFormatter(logging.Formatter("%(message)s"))
        ours.addHandler(shown)
    return handler
