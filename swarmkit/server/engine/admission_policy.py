"""When a server is full, for how long, and which idle sessions make room: decisions only, over plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarmkit.net.transport.shares import NOBODY, Holder, gives_way
from swarmkit.server.engine.scheduler import PassTimes

LEAST_RETRY_S = 0.1
MOST_RETRY_S = 30.0
"""Longest time that a client is told to wait: it is not known for longer ahead which sessions end."""
_UNMEASURED_TENURE_S = 1.0


@dataclass(frozen=True)
class Ahead:
    """The work that a step finds when it arrives."""

    steps: int = 0
    """Number of steps and jobs that run or wait."""
    wait_s: float = 0.0
    """Seconds that the step is expected to wait for them."""


NOTHING_AHEAD = Ahead()


def expected_wait_s(
    tokens: int, decode: bool, ahead: Sequence[int], times: PassTimes, chunk_tokens: int
) -> float:
    """Estimate the seconds that a step waits for others, before its own work or in between.

    A decode step waits for the forward pass that runs, and is in the next one. A longer step shares the
    device with all others in equal parts (processor sharing): of each, as many tokens run before it is done
    as it has itself, or as many as are left.

    Args:
        tokens: rows x tokens of the step.
        decode: whether it is a decode step.
        ahead: rows x tokens that are left of each step that is here.
        times: how long forward passes take.
        chunk_tokens: at most so many run in one of them.
    """
    if decode:
        return times.of(min(sum(ahead), chunk_tokens))
    passes, rest = divmod(sum(min(tokens, left) for left in ahead), chunk_tokens)
    return passes * times.of(chunk_tokens) + times.of(rest)


def retry_after_s(seconds: float) -> float:
    """Return the seconds that a client is told to wait, if there is room again in `seconds`."""
    return min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S)


class Tenures:
    """How long sessions last, learned from those that have ended.

    Sessions that begin and end independently of each other end at random times: of n that usually last t
    seconds the next one ends in t / n, however long each has lasted so far.
    """

    _WEIGHT = 0.1  # of the latest one

    def __init__(self) -> None:
        self._usual_s: float | None = None

    def ended(self, seconds: float) -> None:
        """A session that held memory ended after `seconds`."""
        usual = self._usual_s
        self._usual_s = seconds if usual is None else usual + self._WEIGHT * (seconds - usual)

    def next_end_s(self, sessions: int) -> float:
        """Return the seconds until one of `sessions` sessions is expected to end, as clients are told."""
        usual = _UNMEASURED_TENURE_S if self._usual_s is None else self._usual_s
        return retry_after_s(usual / max(sessions, 1))


@dataclass(frozen=True)
class Holding:
    """The bytes that a session holds, and for how long it has been idle."""

    key: str
    nbytes: int
    idle_s: float
    holder: Holder = NOBODY
    busy: bool = False
    """Whether it runs a step."""


def beyond_share(holdings: Sequence[Holding], asking: Holder, needed: int, capacity: int) -> list[str]:
    """Return the sessions that end so that a peer has `needed` more of what it has a share of.

    They are of peers that hold more than their share: those that are idle longest first, and last those that
    run a step. None ends where that would not be enough.
    """
    held: dict[Holder, float] = {}
    for holding in holdings:
        held[holding.holder] = held.get(holding.holder, 0.0) + holding.nbytes
    free = capacity - sum(held.values())
    if free < needed and gives_way(held, asking, needed, capacity) is None:
        return []  # as for a crowd that asks again and again, for which nothing is sorted
    left = sorted((one for one in holdings if one.nbytes), key=lambda one: (not one.busy, one.idle_s))
    chosen: list[str] = []
    while free < needed:
        victim = gives_way(held, asking, needed, capacity)
        longest = next((one for one in reversed(left) if one.holder == victim), None)
        if victim is None or longest is None:
            return []
        left.remove(longest)
        chosen.append(longest.key)
        held[victim] -= longest.nbytes
        free += longest.nbytes
    return chosen


def to_evict(
    holdings: Sequence[Holding], needed_bytes: int, least_idle_s: float, *, partly: bool = False
) -> list[str]:
    """Return the sessions that end so that `needed_bytes` more are free: those that are idle longest.

    Args:
        least_idle_s: a session that did a step more recently stays, since its client is likely to go on.
        partly: whether sessions also end where all that may go would not be enough.
    """
    chosen: list[str] = []
    for holding in sorted(holdings, key=lambda holding: holding.idle_s, reverse=True):
        if needed_bytes <= 0 or holding.idle_s < least_idle_s:
            break
        if holding.nbytes:
            chosen.append(holding.key)
            needed_bytes -= holding.nbytes
    return chosen if needed_bytes <= 0 or partly else []
