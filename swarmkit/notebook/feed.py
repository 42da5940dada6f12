"""The thread that carries events to a view and has it drawn a few times a second."""

from __future__ import annotations

import threading
from collections.abc import Callable

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.events import Event, Subscription

MOST_PER_S = 8.0
"""Drawings a second, at most: more than that looks no better, and costs the kernel's thread time."""

_IDLE_S = 1.0


class Feed:
    """Reads a subscription in a thread of its own until it is closed."""

    def __init__(
        self,
        subscription: Subscription,
        add: Callable[[Event], object],
        draw: Callable[[], object],
        on_end: Callable[[], object] = lambda: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Begin to read.

        Args:
            add: called with each event.
            draw: called after events, at most `MOST_PER_S` times a second, and at least once a second.
            on_end: called once, when no events follow.
        """
        self._subscription = subscription
        self._add = add
        self._draw = draw
        self._on_end = on_end
        self._clock = clock
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
        shortest = 1.0 / MOST_PER_S
        drawn = -shortest
        closed = False
        while not closed:
            event = self._subscription.get(timeout=_IDLE_S)
            closed = self._ending.is_set() or (event is None and self._subscription.closed)
            if event is not None:
                # Events that come close together are drawn together.
                self._ending.wait(max(0.0, drawn + shortest - self._clock.now()))
                self._add(event)
            for each in self._subscription.pending():
                self._add(each)
            self._draw()
            drawn = self._clock.now()
        self._on_end()
