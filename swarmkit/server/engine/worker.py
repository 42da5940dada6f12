"""What an engine's turns run on: a thread of their own, where nothing else is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from swarmkit.clock import Clock

_SWITCH_S = 0.0002
"""Seconds after which Python hands its lock to a thread that waits for it, at most.

The event loop gives the lock up with each message that it sends or receives. With Python's usual 5 ms, each
of them would wait for about as long as a turn beside it takes by itself.
"""

_LEAST_SHARE = 0.01
_LONGEST_REST_S = 10.0
"""After one turn, which takes much less than a second."""


class Worker(Protocol):
    """Runs turns one after the other while there is work, beside the event loop.

    A simulation has one that runs turns on the event loop, and lets their outcome arrive after the time that
    the work would have taken.

    Attributes:
        compute_share: the share of time in which turns may run. After each turn it rests for the other time,
            of which what it waits for work is a part.
    """

    compute_share: float

    def now(self) -> float:
        """Seconds on the engine's clock, during a turn and outside of one."""

    def start(self, turn: Callable[[], float | None], end: Callable[[], None]) -> None:
        """Begin.

        Args:
            turn: does one piece of work; returns for how many seconds there is nothing to do, 0 to be called
                again at once, and None to be called when it rings.
            end: called last, after the turn that was running when `stop` was called.
        """

    def ring(self) -> None:
        """There is something new to do. Called on the event loop's thread."""

    def stop(self) -> None:
        """Run no more turns than the present one. Does not wait."""

    def join(self) -> None:
        """Wait until the last turn is over; at once if called by a turn."""

    def deliver(self, loop: asyncio.AbstractEventLoop, act: Callable[..., object], *args: object) -> None:
        """Have the event loop call `act`, unless it has ended."""


class ThreadWorker:
    """A thread, for devices that are there."""

    def __init__(self, name: str, clock: Clock, rest: Callable[[float], object] | None = None) -> None:
        """Args: rest: lets so many seconds pass, or ends with `stop`; if not given, the thread waits."""
        self.now = clock.now
        self._name = name
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # a ring per piece of work, and a last one
        self._stopped = False
        self._stopping = threading.Event()
        self._rest = rest or self._stopping.wait
        self.compute_share = 1.0
        self._rested_at = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, turn: Callable[[], float | None], end: Callable[[], None]) -> None:
        """See `Worker.start`."""
        self._turn, self._end = turn, end
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        self._thread.start()

    def ring(self) -> None:
        """See `Worker.ring`."""
        self._bell.put(None)

    def stop(self) -> None:
        """See `Worker.stop`."""
        self._stopped = True
        self._stopping.set()
        self._bell.put(None)

    def join(self) -> None:
        """See `Worker.join`."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def deliver(self, loop: asyncio.AbstractEventLoop, act: Callable[..., object], *args: object) -> None:
        """See `Worker.deliver`."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it every caller
            loop.call_soon_threadsafe(act, *args)

    def _run(self) -> None:
        # torch learns how many threads it may use in each thread at its first parallel loop; matrix products
        # before that would use another number, and differ in their last bits from all later ones.
        torch.get_num_threads()
        timeout: float | None = None
        while not self._stopped:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=timeout)
            timeout = 0.0
            while timeout == 0 and not self._stopped:
                timeout = self._turn() if self.compute_share >= 1 else self._turn_and_rest()
        self._end()

    def _turn_and_rest(self) -> float | None:
        owed_s = self._rested_at - self.now()
        if owed_s > 0:
            self._rest(owed_s)
            if self._stopped:
                return None
        began = self.now()
        timeout = self._turn()
        ended = self.now()
        rest_s = (ended - began) * (1 / max(self.compute_share, _LEAST_SHARE) - 1)
        self._rested_at = ended + min(rest_s, _LONGEST_REST_S)
        return timeout
