"""The thread that carries events to a view and has it drawn a few times a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.events import Event, Subscription

MOST_PER_S = 8.0
"""Drawings a second, at most: more than that looks no better, and costs the kernel's thread time."""

MOST_SHARE = 0.008
"""Share of one processor that the drawings of a view take at most, so that a few views cannot slow an answer.
A drawing that takes long is followed by a longer rest; `benchmarks/views.py` measures what remains."""

_IDLE_S = 1.0


def rest_s(took_s: float, idle_s: float = _IDLE_S) -> float:
    """Seconds from the beginning of a drawing that took so much processor time to that of the next one."""
    return min(idle_s, max(1.0 / MOST_PER_S, took_s / MOST_SHARE))


class Feed:
    """Reads a subscription in a thread of its own until it is closed."""

    def __init__(
        self,
        subscription: Subscription,
        add: Callable[[Event], object],
        draw: Callable[[], bool],
        on_end: Callable[[], object] = lambda: None,
        clock: Clock = SYSTEM_CLOCK,
        every_s: float = _IDLE_S,
    ) -> None:
        """Begin to read.

        Args:
            add: called with each event.
            draw: called after events, at most `MOST_PER_S` times a second, and after `every_s` seconds
                without any. Returns whether there is more to see.
            on_end: called once, when no events follow.
        """
        self._subscription = subscription
        self._add = add
        self._draw = draw
        self._on_end = on_end
        self._clock = clock
        self._every_s = every_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="swarmkit-view", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after a last drawing. May be called twice."""
        self._ending.set()
        self._subscription.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _run(self) -> None:
        next_at = self._clock.now()
        goes_on = True
        while goes_on:
            event = self._subscription.get(timeout=self._every_s)
            ended = self._ending.is_set() or (event is None and self._subscription.closed)
            if event is not None:
                # Events that come close together are drawn together.
                self._ending.wait(max(0.0, next_at - self._clock.now()))
                self._add(event)
            for each in self._subscription.pending():
                self._add(each)
            began, used = self._clock.now(), time.thread_time()
            goes_on = self._draw() and not ended
            next_at = began + rest_s(time.thread_time() - used)
        self._subscription.close()
        self._on_end()
