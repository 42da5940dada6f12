"""Answers at a time: so many run, and the others wait in the order in which they came."""

from __future__ import annotations

import asyncio

from swarmkit.api.refusals import ApiError


class WaitingLine:
    """Who may run, and who is at which place of the line; to be used on one event loop."""

    def __init__(self, most_running: int, most_waiting: int) -> None:
        self._most_running = most_running
        self._most_waiting = most_waiting
        self._inside: list[Ticket] = []

    @property
    def running(self) -> int:
        """How many run now."""
        return min(len(self._inside), self._most_running)

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return len(self._inside) - self.running

    def join(self) -> Ticket:
        """Come in, at the end of the line.

        Raises:
            ApiError: too many wait already.
        """
        if len(self._inside) >= self._most_running + self._most_waiting:
            message = f"{len(self._inside)} others are answered or wait already; try again in a minute"
            raise ApiError(429, message, code="busy", retry_after_s=60)
        ticket = Ticket(self)
        self._inside.append(ticket)
        return ticket

    def _place(self, ticket: Ticket) -> int:
        return max(0, self._inside.index(ticket) + 1 - self._most_running)

    def _leave(self, ticket: Ticket) -> None:
        if ticket in self._inside:
            self._inside.remove(ticket)
            for each in self._inside:
                each.moved.set()


class Ticket:
    """One place in the line; a context manager, which leaves it.

    Attributes:
        moved: set when the place may have changed since the last `look`.
    """

    def __init__(self, line: WaitingLine) -> None:
        self._line = line
        self.moved = asyncio.Event()

    def look(self) -> int:
        """The place: 1 for the first who waits; 0 for one who may run."""
        self.moved.clear()
        return self._line._place(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self._line._leave(self)
