"""Following the worker: its state as it changes, and the lease that it needs from the person's session."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

from swarmkit.errors import SwarmkitError
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.values import Status
from swarmkit.worker.sensing.session import SessionSensing

logger = logging.getLogger(__name__)

_LOOK_S = 15.0
"""Seconds until the state is asked for even where nothing is told: counts change without an event."""
_AGAIN_S = 2.0
_RENEW_PART = 0.7
"""The part of a lease after which it is renewed."""


class WorkerWatch:
    """Two threads: one follows the worker's state, the other one tells it what is sensed here.

    Args:
        on_status: called in a thread whenever the state may have changed; None: no worker answers.
    """

    def __init__(
        self, client: WorkerClient, sensing: SessionSensing, on_status: Callable[[Status | None], None]
    ) -> None:
        self._client, self._sensing, self._on_status = client, sensing, on_status
        self._holder = f"tray-{secrets.token_hex(8)}"
        self._ended = threading.Event()
        self._look = threading.Event()
        self._tell_now = threading.Event()
        self._threads = [
            threading.Thread(target=self._tell, name="swarmkit-lease", daemon=True),
            threading.Thread(target=self._follow_events, name="swarmkit-worker-events", daemon=True),
            threading.Thread(target=self._follow, name="swarmkit-worker-status", daemon=True),
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def look(self) -> None:
        """Ask for the state now, in the thread that follows it."""
        self._look.set()

    def stop(self) -> None:
        """End, and give the lease back."""
        self._ended.set()
        self._look.set()
        self._tell_now.set()
        self._threads[0].join(5.0)
        self._threads[2].join(5.0)
        # The thread that reads events ends with the next empty line, or with the process.
        try:
            self._client.release_lease(self._holder)
        except SwarmkitError as error:
            logger.debug("the lease was not given back: %s", error)

    def _follow(self) -> None:
        while not self._ended.is_set():
            self._look.clear()
            status: Status | None
            try:
                status = self._client.status()
            except SwarmkitError as error:
                logger.debug("no state: %s", error)
                status = None
            if not self._ended.is_set():
                self._on_status(status)
            self._look.wait(_LOOK_S if status is not None else _AGAIN_S)

    def _follow_events(self) -> None:
        while not self._ended.is_set():
            try:
                with self._client.events() as events:
                    before: Mapping[str, Any] = {}
                    for event in events:
                        self._look.set()
                        if wants_signals(event, before):
                            self._tell_now.set()
                        before = event
                        if self._ended.is_set():
                            return
            except SwarmkitError as error:
                logger.debug("no events: %s", error)
            self._look.set()
            self._ended.wait(_AGAIN_S)

    def _tell(self) -> None:
        with self._client.keep_lease(self._holder) as lease:
            while True:
                self._tell_now.clear()
                if self._ended.is_set():
                    return
                wait_s = _AGAIN_S
                signals = self._sensing.sense()
                try:
                    wait_s = lease.renew(signals).seconds * _RENEW_PART
                except SwarmkitError as error:
                    logger.debug("the lease was not renewed: %s", error)
                self._tell_now.wait(wait_s)


def wants_signals(event: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether the worker begins to wait for what is sensed here: to start a node, or as it knows nothing.

    While it lends nothing its leases are long, so that it may know only what was so some seconds ago.

    Args: before: the event before this one; empty: there was none.
    """
    if "status" in event:  # the first one, perhaps of a worker that has just started and knows of no tray
        return True
    waits = event.get("state") == "starting" or event.get("reason") == "no_tray"
    return waits and (event.get("state"), event.get("reason")) != (before.get("state"), before.get("reason"))
