"""Wait until the program is asked to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from swarmkit.cli.interrupt import end_at_once

Reason = Literal["signal", "stdin"]


class EndRequest:
    """Set by Ctrl-C, SIGTERM, or the end of standard input. A second signal asks for haste.

    Attributes:
        is_orderly: whether a request is noted for `wait`. As long as it is not, which is while the program
            starts and no peer relies on it, a request ends the program at once.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.skip_drain = threading.Event()
        self.reason: Reason = "signal"
        self.is_orderly = False

    def request(self, reason: Reason = "signal", exit_code: int = 0) -> None:
        """Ask the program to end.

        Args: exit_code: with which it ends at once if it has only started.
        """
        if not self.is_orderly:
            end_at_once(exit_code)
        if self._event.is_set():
            self.skip_drain.set()
        self.reason = reason
        self._event.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the end was requested within `timeout` seconds. Signals are handled while waiting."""
        return self._event.wait(timeout)

    @property
    def requested(self) -> bool:
        return self._event.is_set()


@contextmanager
def end_request(*, watch_stdin: bool = False) -> Iterator[EndRequest]:
    """Turn signals (and the end of standard input) into an `EndRequest`; put the handlers back at the end."""
    request = EndRequest()
    handlers = {
        number: signal.signal(number, lambda caught, _: request.request("signal", 128 + caught))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    if watch_stdin:
        threading.Thread(target=_watch_stdin, args=(request,), name="swarmkit-stdin", daemon=True).start()
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _watch_stdin(request: EndRequest) -> None:
    # Raw reads: a buffered reader's lock held by a daemon thread makes the interpreter's end abort.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    request.request("stdin")
