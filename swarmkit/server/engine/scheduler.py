"""What the device does next: which steps' tokens go through the next forward pass, or which job runs.

Decisions only, over plain data; the engine does them. In this order:

1. every step of few tokens (a *decode* step: somebody watches them appear), up to a cap;
2. of longer steps (*prefill*), beside them or before the next of them comes, as many tokens as leave the
   decode steps within their time;
3. a job, when there is no step, or when it has been passed over often enough.

Among equals the client that has been served least comes first, and whatever has been passed over too often
comes before everything of its kind, so that nobody starves.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from swarmkit.ewma import Ewma

S = TypeVar("S")

DECODE_TOKENS = 16
"""A step of at most so many tokens per row is a decode step, also with a draft's tokens; it is never cut."""

MOST_DECODE_TOKENS = 256
"""Tokens of decode steps in one forward pass."""

_PATIENCE = 16
"""Who has been passed over so many times is next."""
_STAGE_PATIENCE = 2
"""A stage that has been passed over so many times is next."""
_ROWS = 4
"""Matrix libraries take rows by so many at a time: the fifth token of a forward pass costs nearly as much as
all from the fifth to the eighth, so prefill fills them up."""


@dataclass(frozen=True)
class WaitingStep:
    """A step, or what is left of it."""

    key: int
    client_served: float
    """Tokens that its client has been served so far, over all its sessions."""
    rows: int
    tokens: int
    """Per row, still to run."""
    decode: bool
    waited_s: float
    """Since it came."""
    passed_over: int
    """Turns since it came, or was last part of one."""


@dataclass(frozen=True)
class WaitingJob:
    """Something that runs by itself, for as long as it takes."""

    key: int
    bulk: bool
    passed_over: int
    """Turns that jobs of its kind have waited for since one of them was run."""


@dataclass(frozen=True)
class ScheduledTokens:
    """So many tokens (per row) of a step."""

    key: int
    tokens: int


@dataclass(frozen=True)
class Schedule:
    """What the device does next: one job, or one forward pass over shares of some steps.

    Neither is a pause: there is something to do, but others' decode steps are expected too soon for that.
    """

    shares: tuple[ScheduledTokens, ...] = ()
    job: int | None = None


@dataclass(frozen=True)
class ExpectedArrivals:
    """The next decode steps of those who decode at present, and are elsewhere just now."""

    arrivals: tuple[tuple[float, int], ...] = ()
    """Seconds until each comes, the first one first, and its tokens. Below 0: it is overdue; infinity: so
    long that nobody should wait for it."""

    soonest_s: float = math.inf
    """Until the first of them may come, as far as they vary; infinity: there is no saying."""

    @property
    def tokens(self) -> int:
        """In all of them."""
        return sum(tokens for _, tokens in self.arrivals)


@dataclass(frozen=True)
class PassLimits:
    """How far prefill may go."""

    chunk_tokens: int
    """At most so many tokens of prefill in one forward pass (rows x tokens)."""
    decode_slowdown: float
    """While somebody decodes, a forward pass may take so many times as long as without prefill."""


def next_stage(waiting: Mapping[S, Sequence[WaitingStep]]) -> S | None:
    """Which of the stages on a device has the next forward pass; None: no step waits.

    One with a decode step comes before one with prefill only, and then the one whose step waits for longest;
    but a stage that was passed over twice is next.
    """

    def urgency(stage: S) -> tuple[bool, bool, float]:
        steps = waiting[stage]
        neglected = len(waiting) > 1 and max(step.passed_over for step in steps) >= _STAGE_PATIENCE
        return neglected, any(step.decode for step in steps), max(step.waited_s for step in steps)

    return max(waiting, key=urgency, default=None)


def next_schedule(
    steps: Sequence[WaitingStep],
    jobs: Sequence[WaitingJob],
    expected: ExpectedArrivals,
    times: PassTimes,
    limits: PassLimits,
) -> Schedule | None:
    """What to do next; None: there is nothing to do.

    Args:
        steps, jobs: all that waits, in order of arrival.
        expected: the steps of those who decode, and do not wait now.
        times: how long forward passes take.
    """
    due = [job for job in jobs if not steps or job.passed_over >= (_PATIENCE if job.bulk else 1)]
    if due:
        return Schedule(job=min(due, key=lambda job: (job.passed_over < _PATIENCE, job.bulk)).key)
    shares: list[ScheduledTokens] = []
    tokens, waited_s = 0, 0.0
    for step in sorted((step for step in steps if step.decode), key=_order):
        if shares and tokens + step.rows * step.tokens > MOST_DECODE_TOKENS:
            continue
        shares.append(ScheduledTokens(step.key, step.tokens))
        tokens += step.rows * step.tokens
        waited_s = max(waited_s, step.waited_s)
    prefills = sorted((step for step in steps if not step.decode), key=_order)
    if shares and not prefills and _worth_waiting(tokens, waited_s, expected, times):
        return Schedule()
    if prefills:
        passed_over = max(step.passed_over for step in prefills)
        if shares:
            budget = _prefill_beside(tokens, waited_s, passed_over > 1, times, limits)
        else:
            budget = _prefill_before(expected, passed_over > 0, times, limits)
        for step in prefills:
            # The first goes on by a token even if its rows are more than the budget.
            chunk = min(step.tokens, budget // step.rows or (budget > 0 and step is prefills[0]))
            if chunk:
                shares.append(ScheduledTokens(step.key, chunk))
                budget -= chunk * step.rows
    return Schedule(tuple(shares)) if steps else None


def _worth_waiting(tokens: int, waited_s: float, expected: ExpectedArrivals, times: PassTimes) -> bool:
    """Whether decode steps had better wait a little for others, and run together with them.

    The outputs of a pass leave one after the other, and come to the next server so. If the first one's step
    began there at once, all others would wait for it, and so it would go on, round after round. So a step
    waits for at most half of what running together saves, or, for more than there is of it, as long as it
    takes by itself, if the device then does more in the same time.
    """
    alone_s = times.of(tokens)
    more = 0
    for in_s, its_tokens in expected.arrivals:
        more += its_tokens
        together_s = times.of(tokens + more)
        half_s = (alone_s + times.of(more) - together_s) / 2
        if -half_s < in_s < half_s - waited_s:
            return True
        ready_s = max(in_s, 0.0)
        soon = -alone_s / 2 < in_s and ready_s + waited_s < alone_s
        faster = (tokens + more) / (ready_s + together_s) > tokens / alone_s if alone_s else False
        if more > tokens and soon and faster:
            return True
    return False


def _prefill_beside(
    tokens: int, waited_s: float, starving: bool, times: PassTimes, limits: PassLimits
) -> int:
    """Tokens of prefill beside `tokens` of decode steps, which have waited for `waited_s`.

    So many that the decode steps are done within the slowdown's time, counted from when they came. Where they
    have used that up by waiting, none, but not for long.
    """
    allowed_s = limits.decode_slowdown * times.of(tokens) - waited_s
    return _chunk(times.tokens_within(allowed_s), tokens, starving, limits)


def _prefill_before(expected: ExpectedArrivals, starving: bool, times: PassTimes, limits: PassLimits) -> int:
    """Tokens of prefill when no decode step is waiting.

    A whole chunk when nobody decodes. Else so many that the next decode step is done within the slowdown's
    time, though it come as soon as it may: while it is elsewhere the device has nothing else to do, and what
    is left of the chunk when it comes is less than a chunk beside it would add. Where not even the least
    fits, none, but not after every decode step.
    """
    if not expected.tokens:
        return limits.chunk_tokens
    alone_s = times.of(expected.tokens)
    is_late = any(in_s == math.inf for in_s, _ in expected.arrivals)  # and may come any moment
    soonest_s = min(expected.soonest_s, alone_s) if is_late else expected.soonest_s
    fitting = times.tokens_within(max(soonest_s, 0.0) + (limits.decode_slowdown - 1) * alone_s)
    return _chunk(fitting, 0, starving, limits)


def _chunk(fitting: int, others: int, starving: bool, limits: PassLimits) -> int:
    """Tokens of prefill in a pass with `others`, in which `fitting` in all are done in time.

    At least the pass's last rows are filled up, or there are none. Who starves gets those anyway.
    """
    tokens = fitting - fitting % _ROWS - others
    if tokens <= 0:
        tokens = _ROWS - others % _ROWS if starving else 0
    return min(tokens, limits.chunk_tokens)


def _order(step: WaitingStep) -> tuple[bool, float]:
    return step.passed_over < _PATIENCE, step.client_served


@dataclass
class FairShares:
    """Tokens that each client has been served, such that being away saves nothing up.

    Who comes (back) starts from what the least served of those present has had: else a newcomer would take
    everything until it had caught up with people who have been here for hours. When nobody has stayed, nobody
    had to wait, and all begin anew.
    """

    _served: dict[str, float] = field(default_factory=dict)
    _present: set[str] = field(default_factory=set)

    def of_present(self, clients: Iterable[str]) -> dict[str, float]:
        """What each of those has been served who want something now."""
        now = set(clients)
        stayed = now & self._present
        self._present = now
        if not stayed:
            self._served = dict.fromkeys(now, 0.0)
            return self._served.copy()
        floor = min(self._served[client] for client in stayed)
        for client in now - stayed:
            self._served[client] = max(self._served.get(client, 0.0), floor)
        if len(self._served) > 64 + 2 * len(now):
            # Who has had less than all who are here would be given the floor anyway.
            kept = self._served.items()
            self._served = {client: served for client, served in kept if client in now or served > floor}
        return {client: self._served[client] for client in now}

    def serve(self, client: str, tokens: int) -> None:
        """These tokens were run for a client."""
        self._served[client] = self._served.get(client, 0.0) + tokens


@dataclass(frozen=True)
class _DecodingClient:
    """When a session ran its latest decode step, how long it stays away between two, and their size."""

    done: float
    tokens: int
    away_s: Ewma | None
    """None: it was not away yet, or for too long to tell anything."""


class ArrivalPredictor:
    """Who decodes at present, though he may be elsewhere: at other servers, or choosing his next token.

    A prefill chunk that begins meanwhile is what he would find himself waiting for when he is back. That is
    expected after as long as it usually takes; who is away for much longer has left. Should he be back all
    the same, as when the next server had him wait behind a chunk of its own, he is given more time then.
    """

    _WEIGHT = 0.25  # of the latest time away
    _VARIATIONS = 2  # it may be back sooner than usual by so many
    _TIMES_AWAY = 4
    _LEAST_S, _MOST_S = 0.1, 20.0
    _UNKNOWN_S = 2.0

    def __init__(self) -> None:
        self._sessions: dict[Hashable, _DecodingClient] = {}
        self._left: dict[Hashable, _DecodingClient] = {}
        """Until they have been away for so long that it tells nothing."""

    def decoded(self, session: Hashable, tokens: int, came: float, done: float) -> None:
        """A session has run a decode step of so many tokens."""
        last = self._left.pop(session, None) or self._sessions.get(session)
        usual_s = None
        if last is not None and (away_s := came - last.done) < self._MOST_S:
            usual_s = last.away_s
            if usual_s is None:
                usual_s = Ewma(away_s, away_s / 2, self._WEIGHT)
            else:
                usual_s.observe(away_s)
        self._sessions[session] = _DecodingClient(done, tokens, usual_s)

    def leave(self, session: Hashable) -> None:
        """A session does something else."""
        self._sessions.pop(session, None)
        self._left.pop(session, None)

    def nobody_but(self, session: Hashable) -> bool:
        """Whether no other session decodes, as far as is known without looking at the time."""
        return not self._sessions or (len(self._sessions) == 1 and session in self._sessions)

    def expected(self, now: float, here: Container[Hashable] = ()) -> ExpectedArrivals:
        """The steps of those who are not here."""
        known, self._sessions = self._left | self._sessions, {}
        self._left = {}
        for key, one in known.items():
            if now < self._leaves(one):
                self._sessions[key] = one
            elif now < one.done + self._MOST_S:
                self._left[key] = one
        away = [(self._back_in(one, now), one) for key, one in self._sessions.items() if key not in here]
        soonest_s = min((in_s - self._variation(one) for in_s, one in away), default=math.inf)
        return ExpectedArrivals(tuple(sorted((in_s, one.tokens) for in_s, one in away)), soonest_s)

    def _variation(self, one: _DecodingClient) -> float:
        return 0.0 if one.away_s is None else self._VARIATIONS * one.away_s.deviation

    def _leaves(self, one: _DecodingClient) -> float:
        usual = self._UNKNOWN_S if one.away_s is None else self._TIMES_AWAY * one.away_s.mean
        return one.done + min(max(usual, self._LEAST_S), self._MOST_S)

    def _back_in(self, one: _DecodingClient, now: float) -> float:
        away_s = 0.0 if one.away_s is None else one.away_s.mean
        in_s = one.done + away_s - now
        # Waiting for him is worth as long again; then the prefill goes on.
        return in_s if in_s > -away_s else math.inf


@dataclass
class _Passes:
    """Those over about as many tokens: how many, and how long they take."""

    tokens: float
    seconds: Ewma


class PassTimes:
    """How long a forward pass over n tokens takes, learnt from those that have been.

    Near a + b x n: reading the weights takes a, whatever n is. But only near (few rows of a matrix may take
    another way through a processor than many), so that there is a running mean for each power of two, and
    straight lines between. Old measurements fade: caches grow, and others use the machine.
    """

    _WEIGHT = 0.25  # of a new measurement

    def __init__(self) -> None:
        self._seen: dict[int, _Passes] = {}  # by power of two

    def learn(self, tokens: int, seconds: float) -> None:
        """A forward pass over so many tokens took so long."""
        power = tokens.bit_length()
        passes = self._seen.get(power)
        if passes is None:
            self._seen[power] = _Passes(tokens, Ewma(seconds, 0.0, self._WEIGHT))
            return
        passes.tokens += self._WEIGHT * (tokens - passes.tokens)
        # One that was held up by something else is not to be believed at once.
        passes.seconds.observe(min(seconds, 4 * passes.seconds.mean))

    def of(self, tokens: float) -> float:
        """Seconds for so many tokens; 0 before anything was measured.

        For fewer than were ever measured it is less than it will be, lest somebody's first decode step be
        taken for as long as the long prompt that came before it; for more, as if each token took the same.
        """
        points = self._points(0.0)
        if points and tokens > points[-1][0]:
            return points[-1][1] * tokens / points[-1][0]
        return _on_lines(points, tokens)

    def tokens_within(self, seconds: float) -> int:
        """How many tokens fit into so much time, also if they take longer than usual by as much as they do at
        times; 0 if not one does, or nothing was measured.
        """
        points = self._points(1.0)
        low, high = 0, 1
        while high < 2**20 and 0 < _on_lines(points, high) <= seconds:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _on_lines(points, middle) <= seconds else (low, middle)
        return low

    def _points(self, deviations: float) -> list[tuple[float, float]]:
        """Tokens, and seconds with so many deviations."""
        # The event loop asks while the engine's thread learns; the list is made at once.
        seen = list(self._seen.values())
        return sorted((one.tokens, one.seconds.mean + deviations * one.seconds.deviation) for one in seen)


def _on_lines(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Seconds for so many tokens on the lines between `points`, from (0, 0) on; 0 without any.

    The last one goes on, but as a line through two points is not to be believed far, at least half as steep
    as from (0, 0).
    """
    if not points:
        return 0.0
    if tokens <= points[0][0]:
        return points[0][1] * tokens / points[0][0]
    if tokens >= points[-1][0]:
        most, most_s = points[-1]
        slope = most_s / most
        if len(points) > 1:
            slope = max((most_s - points[-2][1]) / (most - points[-2][0]), slope / 2)
        return most_s + slope * (tokens - most)
    right = next(index for index, point in enumerate(points) if point[0] >= tokens)
    (low, low_s), (high, high_s) = points[right - 1 : right + 1]
    return low_s + (high_s - low_s) * (tokens - low) / (high - low)
