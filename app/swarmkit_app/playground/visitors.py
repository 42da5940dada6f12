"""Those who use the page: which answers each one has under way, and how many each may ask for."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit_app.playground.answers import AnswerRun

_MINUTE_S = 60.0
_LONGEST_END_S = 5.0
_MOST_VISITORS = 10_000
"""Visitors whose last minute is remembered; beyond it, those who asked longest ago are forgotten."""


@dataclass
class _Over:
    """The turns of a part of a page that are over, whether they have begun or not: all up to these."""

    stopped: int = 0
    left: int = 0


@dataclass
class Visitors:
    """The answers under way on each visitor's page: one for each part of the page that shows an answer.

    What a visitor clicks arrives as requests of which any may overtake any other. So the page counts the
    clicks that ask for an answer, and each request says its turn: a stop names the last turn that was asked
    for, and ends that one and those before it, also where the request for it arrives later.
    """

    running: dict[tuple[str, str], AnswerRun] = field(default_factory=dict)
    _turns: dict[AnswerRun, int | None] = field(default_factory=dict)
    over: OrderedDict[tuple[str, str], _Over] = field(default_factory=OrderedDict)
    """Which answers are over, by visitor and part of the page."""

    async def begin(self, visitor: str, part: str, run: AnswerRun, turn: int | None = None) -> None:
        """Note an answer, and wait until nothing more is shown of the one before it in this part of the page.

        Args: turn: counts what the visitor asked for in this window, from 1 on; None = it is the last one.
        """
        over = self._marks(visitor, part)
        if turn is not None and turn <= over.left:
            run.leave()
        elif turn is not None and turn <= over.stopped:
            run.stop()
        else:
            before = self.leave(visitor, part, None if turn is None else turn - 1)
            self.running[visitor, part] = run
            self._turns[run] = turn
            await _end_of(before)

    def stop(self, visitor: str, part: str, turn: int | None = None) -> None:
        """End the visitor's answer in a part of the page.

        Args: turn: the last that is to end, with all before it; None = the one that runs.
        """
        over = self._marks(visitor, part)
        over.stopped = max(over.stopped, turn or 0)
        if (run := self._running(visitor, part, turn)) is not None:
            run.stop()

    def leave(self, visitor: str, part: str, turn: int | None = None) -> AnswerRun | None:
        """The same, and show nothing more of it, as something else takes its place.

        Returns: the answer, if one is under way.
        """
        over = self._marks(visitor, part)
        over.left = max(over.left, turn or 0)
        run = self._running(visitor, part, turn)
        if run is not None:
            run.leave()
        return run

    async def clear(self, visitor: str, part: str, turn: int | None = None) -> None:
        """The same, and wait until it has happened."""
        await _end_of(self.leave(visitor, part, turn))

    def gone(self, visitor: str) -> None:
        """End whatever the visitor has under way; the page is closed."""
        for key in [key for key in self.running if key[0] == visitor]:
            self.running[key].leave()
        for key in [key for key in self.over if key[0] == visitor]:
            del self.over[key]

    def end(self, visitor: str, part: str, run: AnswerRun) -> None:
        """Forget an answer that has ended, unless another has taken its place."""
        self._turns.pop(run, None)
        if self.running.get((visitor, part)) is run:
            del self.running[visitor, part]

    def _running(self, visitor: str, part: str, turn: int | None) -> AnswerRun | None:
        """The answer under way, if it is of this turn or one before."""
        run = self.running.get((visitor, part))
        own = None if run is None else self._turns[run]
        return None if turn is not None and own is not None and turn < own else run

    def _marks(self, visitor: str, part: str) -> _Over:
        found = self.over.setdefault((visitor, part), _Over())
        self.over.move_to_end((visitor, part))
        while len(self.over) > _MOST_VISITORS:
            self.over.popitem(last=False)
        return found


async def _end_of(run: AnswerRun | None) -> None:
    """Wait until an answer that was left has ended, but not for long where a server is slow to answer."""
    if run is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.ended.wait(), _LONGEST_END_S)


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
