"""Those who use the page: which answers each one has under way, and how many each may ask for."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit_app.playground.answers import AnswerRun

_MINUTE_S = 60.0
_MOST_VISITORS = 10_000
"""Visitors whose last minute is remembered; beyond it, those who asked longest ago are forgotten."""


@dataclass
class Visitors:
    """The answers under way on each visitor's page: one for each part of the page that shows an answer."""

    running: dict[tuple[str, str], AnswerRun] = field(default_factory=dict)

    def begin(self, visitor: str, part: str, run: AnswerRun) -> None:
        """End the answer under way in this part of the visitor's page, if one is, and note another."""
        self.stop(visitor, part)
        self.running[visitor, part] = run

    def stop(self, visitor: str, part: str | None = None) -> None:
        """End the visitor's answer in a part of the page, or in all parts."""
        for key in [key for key in self.running if key[0] == visitor and part in (None, key[1])]:
            self.running.pop(key).stop()

    def end(self, visitor: str, part: str, run: AnswerRun) -> None:
        """Forget an answer that has ended, unless another has taken its place."""
        if self.running.get((visitor, part)) is run:
            del self.running[visitor, part]


class Allowance:
    """How many answers a visitor may ask for within a minute."""

    def __init__(self, per_minute: int | None, clock: Clock = SYSTEM_CLOCK) -> None:
        """Begin to count; None allows everything."""
        self._per_minute = per_minute
        self._clock = clock
        self._asked: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, visitor: str) -> float:
        """Count one more answer; returns 0, or the seconds after which the visitor may ask again."""
        if self._per_minute is None:
            return 0.0
        now = self._clock.now()
        times = self._asked.setdefault(visitor, deque())
        self._asked.move_to_end(visitor)
        while len(self._asked) > _MOST_VISITORS:
            self._asked.popitem(last=False)
        while times and now - times[0] >= _MINUTE_S:
            times.popleft()
        if len(times) >= self._per_minute:
            return times[0] + _MINUTE_S - now
        times.append(now)
        return 0.0


def counted_as(session: str, address: str | None, name: str | None) -> str:
    """Whom an answer is counted for: all at one address, as a page that is loaded anew is no new visitor.

    On this machine itself, every page is a visitor: there, all have the same address.

    Args:
        session: names the page in one window.
        address: where the request came from.
        name: what the visitor gave with the password, if one was asked for.
    """
    if address is None or address in ("127.0.0.1", "::1", "localhost", "testclient"):
        return f"page {name or ''} {session}"
    return f"address {address}"
