"""What the device does next: which steps' tokens go through the next forward pass, or which job runs.

Decisions only, over plain data; the engine carries them out. In this order:

1. every step of few tokens (a *decode* step, whose tokens a user watches appear), up to a cap;
2. of longer steps (*prefill*), beside decode steps or before the next of them arrives, as many tokens as
   leave the decode steps within their time;
3. a job, when there is no step, or when it has been passed over often enough. While sessions decode, or did
   lately, bulk jobs rest after each of them, so that they have no more than a share of the time.

Among equals the step of the client that has been served least comes first, and a step that has been passed
over too often comes before all others of its kind, so that none starves. Hosts (the addresses that clients
come from) are served alike, and so are the clients of one host: many names of a stranger are one host.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import NamedTuple, TypeVar

from swarmkit.ewma import Ewma
from swarmkit.models.execution.attention_cost import AttentionCost
from swarmkit.net.transport.shares import NOBODY, Holder
from swarmkit.server.engine.delays import NOTHING_OWED, Owed, prompts_wait

S = TypeVar("S")

NO_ATTENTION = AttentionCost()
"""Of blocks whose attention costs nothing."""

NO_CLIENTS: Mapping[Holder, int] = {}

DECODE_TOKENS = 16
"""A step of at most so many tokens per row is a decode step, also with draft tokens; it is never cut. Only a
step of many rows that is more work than a pass should be is none."""
_MOST_DECODE_WORK = 512

MOST_DECODE_TOKENS = 256
"""Tokens of decode steps in one forward pass."""

_UNHURRIED = 8
"""While no session decodes, the attention of one long prompt may take so many times as long as its linear
layers: cut smaller, it would be read so much more often."""

_STARVING_TURNS = 16
"""A step or job that has been passed over in so many turns is next."""
_BULK_SHARE = 0.3
"""Of the time, for bulk jobs while sessions decode: a token that waits for one of them waits for all of it.
A client beside somebody who trains is to have at least half of its usual speed."""

_OWED_BULK_SHARE = 0.1
"""The same, while somebody is owed something. Training goes on, however busy the device is."""

_MESSAGES_S = 0.001
"""What a step costs beside the device, about: its message is received and checked, and its answer sent."""

_CROWD_SLOWDOWN_SHARE = 0.5
"""Of the slowdown that a decode step may have, for the many steps of another client: these also run, and
their messages come and go, while it is away, so that it waits for some of them first."""

_FEW_OF_A_HOST = 4
"""Decode tokens that a host has in a pass beside another host's, if they are of so many clients: a household
has one address. They cost hardly more than one does."""

_NEWCOMER_PASSES = 8
"""While another client has decoded lately, a piece of a prompt takes no longer than so many passes over one
token: that client's next answer may begin at any moment. The prompt takes an eighth longer for it at most."""

_UNNOTICED_S = 0.02
"""By so much may a piece of a prompt delay another client's token, even if that is many times as long as the
token takes: a shorter piece would cost hardly less. The delay is owed, so that it comes seldom."""

_OTHER_STAGE_TURNS = 2
"""A stage that has been passed over in so many turns is next."""
_ROWS = 4
"""Matrix libraries take rows by so many at a time: the fifth token of a forward pass costs nearly as much as
all from the fifth to the eighth, so prefill fills them up."""


class ServedBefore(NamedTuple):
    """Work that a client has been served so far, over all its sessions, after what its host has been."""

    of_host: float = 0.0
    of_client: float = 0.0


@dataclass(frozen=True)
class WaitingStep:
    """A step, or what is left of it."""

    key: int
    served: ServedBefore
    rows: int
    tokens: int
    """Per row, still to run."""
    decode: bool
    waited_s: float
    """Since it arrived."""
    passed_over: int
    """Turns since it arrived, or was last part of one."""
    past: int = 0
    """Tokens per row that are held before these."""
    cuts_rows: bool = False
    """Whether it may run over some of its rows at a time."""
    keeps_tokens: bool = False
    """Whether some rows have had these tokens already, so that the others get just as many."""
    client: Holder = NOBODY


@dataclass(frozen=True)
class WaitingJob:
    """Work that runs by itself, for as long as it takes."""

    key: int
    bulk: bool
    passed_over: int
    """Turns that jobs of its kind have waited for since one of them was run."""
    rests: bool = False
    """Whether jobs of its kind have had their share of the time, as long as clients decode."""


@dataclass(frozen=True)
class ScheduledTokens:
    """The next `tokens` tokens of the next `rows` rows of a step."""

    key: int
    tokens: int
    rows: int = 1


@dataclass(frozen=True)
class Schedule:
    """What the device does next: one job, or one forward pass over tokens of some steps.

    With neither it pauses: there is work, but decode steps of other sessions are expected too soon for it.
    """

    steps: tuple[ScheduledTokens, ...] = ()
    job: int | None = None


@dataclass(frozen=True)
class ExpectedArrivals:
    """The next decode steps of sessions that decode at present, and have no step here just now."""

    arrivals: tuple[tuple[float, int], ...] = ()
    """Seconds until each step arrives, the first one first, and its tokens. Negative: it is overdue;
    infinity: so long overdue that it is not worth waiting for."""

    soonest_s: float = math.inf
    """Seconds until the first step may arrive, as far as arrivals vary; infinity: unknown."""

    clients: tuple[tuple[Holder, int, float], ...] = ()
    """The client of each step that is not long overdue, the step's tokens, and seconds until it arrives."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return sum(tokens for _, tokens in self.arrivals)

    @classmethod
    def merged(cls, several: Iterable[ExpectedArrivals]) -> ExpectedArrivals:
        """The arrivals at several stages as those at one."""
        each = list(several)
        arrivals = tuple(sorted(arrival for one in each for arrival in one.arrivals))
        clients = tuple(client for one in each for client in one.clients)
        return cls(arrivals, min((one.soonest_s for one in each), default=math.inf), clients)


@dataclass(frozen=True)
class PassLimits:
    """How far prefill may go."""

    chunk_tokens: int
    """Most work of prefill in one forward pass (rows x tokens, and attention)."""
    decode_slowdown: float
    """While a session decodes, a forward pass may take so many times as long as without prefill, and as
    without the many steps of another client."""


def next_stage(waiting: Mapping[S, Sequence[WaitingStep]]) -> S | None:
    """Choose the stage, of those on a device, that has the next forward pass; None: no step waits.

    A stage with a decode step comes before one with prefill only, and then the one whose step has waited for
    longest; but a stage that was passed over twice is next.
    """

    def urgency(stage: S) -> tuple[bool, bool, float]:
        steps = waiting[stage]
        neglected = len(waiting) > 1 and max(step.passed_over for step in steps) >= _OTHER_STAGE_TURNS
        return neglected, any(step.decode for step in steps), max(step.waited_s for step in steps)

    return max(waiting, key=urgency, default=None)


def is_decode(rows: int, tokens: int, past: int, cost: AttentionCost) -> bool:
    """Whether a step is a decode step: few tokens of one row, or of several that are not too much work."""
    return tokens <= DECODE_TOKENS and (rows == 1 or cost.work(rows, tokens, past) <= _MOST_DECODE_WORK)


def next_schedule(
    steps: Sequence[WaitingStep],
    jobs: Sequence[WaitingJob],
    expected: ExpectedArrivals,
    times: PassTimes,
    limits: PassLimits,
    cost: AttentionCost = NO_ATTENTION,
    recent: Mapping[Holder, int] = NO_CLIENTS,
    owed: Mapping[Holder, Owed] = NOTHING_OWED,
    just_served: Set[Holder] = frozenset(),
) -> Schedule | None:
    """Decide what to do next; None: there is nothing to do.

    Args:
        steps: the waiting steps of one stage, in order of arrival.
        jobs: all waiting jobs, in order of arrival.
        expected: the next steps of sessions that decode and have no step waiting.
        times: how long the stage's forward passes take, by their work.
        cost: of the stage's attention.
        recent: the clients that have decoded lately, see `RecentClients`.
        owed: what others owe clients that they have delayed too much, see `Delays`.
        just_served: the clients that have decoded so lately that they can wait, see `OTHERS_WAIT_PASSES`.
    """
    decodes = bool(expected.tokens or recent) or any(step.decode for step in steps)
    ready = [job for job in jobs if not (job.rests and decodes)]
    due = [job for job in ready if not steps or job.passed_over >= (_STARVING_TURNS if job.bulk else 1)]
    if due:
        return Schedule(job=min(due, key=lambda job: (job.passed_over < _STARVING_TURNS, job.bulk)).key)
    scheduled: list[ScheduledTokens] = []
    tokens, waited_s = 0, 0.0
    decode_steps = [step for step in steps if step.decode]
    for step in _decode_steps(decode_steps, expected, times, limits, recent, owed, just_served):
        if scheduled and tokens + step.rows * step.tokens > MOST_DECODE_TOKENS:
            continue
        scheduled.append(ScheduledTokens(step.key, step.tokens, step.rows))
        tokens += step.rows * step.tokens
        waited_s = max(waited_s, step.waited_s)
    prefills = [step for step in steps if not step.decode]
    prompting, decoding = _passed_over_by_client(prefills), {step.client for step in decode_steps}
    if prefills and owed and prompts_wait(owed, prompting, decoding, max(_UNNOTICED_S, times.of(_ROWS))):
        prefills = []
        if not scheduled:
            return Schedule()
    if scheduled and not prefills and owed.keys().isdisjoint(decoding):
        is_cut = len(scheduled) < len(decode_steps)
        if is_cut and (
            _others_come_first(decode_steps, tokens, expected, times)
            or _is_owed_to_others(decode_steps, scheduled, owed, times.of(tokens))
        ):
            return Schedule()
        if worth_waiting(tokens, waited_s, expected, times):
            return Schedule()
    if prefills:
        passed_over = max(step.passed_over for step in prefills)
        decoding |= {client for client, _, _ in expected.clients}
        more_s = _UNNOTICED_S if decoding.isdisjoint(prompting) else 0.0
        if scheduled:
            budget = _prefill_beside(tokens, waited_s, passed_over > 1, times, limits, more_s)
        else:
            budget = _prefill_before(expected, passed_over > 0, times, limits, more_s)
            if budget <= _ROWS and _others_come_first(prefills, budget, expected, times):
                return Schedule()
        hurried = bool(scheduled or expected.tokens)
        if not hurried and not recent.keys() <= prompting.keys():
            hurried = True
            budget = _prefill_before_newcomers(times, limits)
        left: float = budget
        prefills = _prefills_in_order(prefills, prompting)
        for step in prefills:
            piece = _piece(step, left, hurried, cost)
            if not piece.tokens and left > 0 and step is prefills[0]:  # it goes on, if only by a token
                piece = ScheduledTokens(step.key, 1, 1 if step.cuts_rows else step.rows)
                if step.keeps_tokens:
                    piece = replace(piece, tokens=step.tokens)
            if piece.tokens:
                scheduled.append(piece)
                left -= (
                    cost.work(piece.rows, piece.tokens, step.past) if hurried else piece.rows * piece.tokens
                )
    return Schedule(tuple(scheduled)) if steps or jobs else None


def _decode_steps(
    steps: Sequence[WaitingStep],
    expected: ExpectedArrivals,
    times: PassTimes,
    limits: PassLimits,
    recent: Mapping[Holder, int],
    owed: Mapping[Holder, Owed],
    just_served: Set[Holder],
) -> Sequence[WaitingStep]:
    """The decode steps that run next, in the order in which they are taken.

    A client with many sessions runs them all where it is alone. Beside another one that decodes, which waits
    for a step, will before long or has had one lately, each has as many tokens as the one that has fewest,
    and the others have as many more as delay it little, messages included: where passes are short, a hundred
    steps more take hardly longer together than two, and yet a hundred messages come and go for them. Beside a
    client that is owed something, nobody has more than is due, and a crowd that has just decoded nothing.
    """
    clients: dict[Holder, list[WaitingStep]] = {}
    for step in steps:
        clients.setdefault(step.client, []).append(step)
    wanted = {client: sum(step.rows * step.tokens for step in of) for client, of in clients.items()}
    away: dict[Holder, int] = {}
    for client, tokens, _ in expected.clients:
        if client not in clients:
            away[client] = away.get(client, 0) + tokens
    away = {client: tokens for client, tokens in recent.items() if client not in clients} | away
    if len(clients) + len(away) < 2:
        return sorted(steps, key=_order)
    served = {client: of[0].served for client, of in clients.items()}
    due = _tokens_due(wanted, away, served)
    least = sum(min(tokens, due[client]) for client, tokens in wanted.items())
    allowed_s = _allowed_beside_s(least, sum(tokens > 0 for tokens in due.values()), times, limits)
    if not owed.keys().isdisjoint(clients):
        allowed_s = math.ulp(0.0)
        due |= dict.fromkeys(_crowds(wanted, due) & just_served - owed.keys(), 0)
    for of in clients.values():
        of.sort(key=lambda step: step.passed_over)  # the last one is next
    # What is due comes first. The host that has least in this pass is next, of those the one that has been
    # served least; and so with the clients of a host.
    turns: dict[str, list[tuple[bool, int, float, Holder]]] = {}
    for client in clients:
        turn = not due[client], 0, served[client].of_client, client
        turns.setdefault(client.host, []).append(turn)
    hosts = []
    for host, of_host in turns.items():
        heapq.heapify(of_host)
        hosts.append((of_host[0][0], 0, served[of_host[0][3]].of_host, host))
    heapq.heapify(hosts)
    chosen: list[WaitingStep] = []
    total = 0
    while hosts:
        _, host_taken, host_served, host = hosts[0]
        of_host = turns[host]
        is_beyond, taken, client_served, client = of_host[0]
        step = clients[client][-1]
        size = step.rows * step.tokens
        if is_beyond and 0 < allowed_s < times.of(total + size) + _MESSAGES_S * (len(chosen) + 1):
            heapq.heappop(of_host)
        else:
            chosen.append(clients[client].pop())
            total += size
            taken, host_taken = taken + size, host_taken + size
            if clients[client]:
                heapq.heapreplace(of_host, (taken >= due[client], taken, client_served, client))
            else:
                heapq.heappop(of_host)
        if of_host:
            heapq.heapreplace(hosts, (of_host[0][0], host_taken, host_served, host))
        else:
            heapq.heappop(hosts)
    return chosen


def _tokens_due(
    wanted: Mapping[Holder, int], away: Mapping[Holder, int], served: Mapping[Holder, ServedBefore]
) -> dict[Holder, int]:
    """The tokens that each client has in a pass whatever others want: as many as the one with fewest.

    Where clients come from several hosts, no host has more than the one with fewest, but for a few tokens of
    different clients: those that have been served least have a part in the pass, the others in a later one.
    """
    hosts: dict[str, list[int]] = {}
    for client, tokens in (*wanted.items(), *away.items()):
        hosts.setdefault(client.host, []).append(tokens)
    fewest = {host: min(of_host) for host, of_host in hosts.items()}
    if len(hosts) == 1:
        return {client: fewest[client.host] for client in wanted}
    of_each = min(fewest[host] * len(of_host) for host, of_host in hosts.items())
    left = dict.fromkeys(hosts, max(of_each, _FEW_OF_A_HOST))
    due = {}
    for client in sorted(wanted, key=lambda one: (served[one], one)):
        due[client] = min(fewest[client.host], of_each, left[client.host])
        left[client.host] -= due[client]
    return due


def _crowds(wanted: Mapping[Holder, int], due: Mapping[Holder, int]) -> set[Holder]:
    """The clients that have more here than is due; where there are several hosts, all of such a host."""
    several = len({client.host for client in wanted}) > 1
    crowds = {client.host if several else client for client, tokens in wanted.items() if tokens > due[client]}
    return {client for client in wanted if (client.host if several else client) in crowds}


def _allowed_beside_s(least: int, clients: int, times: PassTimes, limits: PassLimits) -> float:
    """Seconds for a pass of decode steps of several clients, and for their messages; 0: nothing is known.

    Args: least: tokens that it has in any case.
    """
    # Passes beside a crowd take longer than those tokens by themselves, and would allow for more of it.
    least_s = min(times.of(least), least * times.of(1))
    slowdown = 1 + _CROWD_SLOWDOWN_SHARE * (limits.decode_slowdown - 1)
    return slowdown * (least_s + _MESSAGES_S * clients) if least_s else 0.0


def most_beside(fewest: int, clients: int, times: PassTimes, limits: PassLimits) -> float:
    """Return how many decode steps a pass can have of one of several clients; infinity: nothing is known.

    More of a crowd need not be looked at to find those that run next.

    Args: fewest: the tokens of the client that has fewest.
    """
    allowed_s = _allowed_beside_s(fewest * clients, clients, times, limits)
    return fewest + allowed_s / _MESSAGES_S if allowed_s else math.inf


def _piece(step: WaitingStep, budget: float, hurried: bool, cost: AttentionCost) -> ScheduledTokens:
    """As much of a long step as is within a budget of work; without tokens if nothing is.

    It is cut by tokens, and by rows where a token of all rows is more than the budget.

    Args: hurried: whether decode steps wait for the pass, or will before long.
    """
    if not step.keeps_tokens:
        most = min(step.tokens, int(budget) // step.rows)
        work = _UNHURRIED * budget if not hurried and (step.rows == 1 or most > 1) else budget + 1
        tokens = cost.tokens_within(work, step.rows, step.past, most) if most > 0 else 0
        if tokens < most:  # the pass's last rows are filled up all the same
            tokens = max(tokens - (tokens - most) % _ROWS, min(tokens, 1))
        if tokens or not step.cuts_rows:
            return ScheduledTokens(step.key, tokens, step.rows)
    tokens = step.tokens if step.keeps_tokens else 1
    rows = cost.rows_within(budget, step.rows, tokens, step.past)
    return ScheduledTokens(step.key, tokens if rows else 0, rows)


def _others_come_first(
    steps: Sequence[WaitingStep], tokens: int, expected: ExpectedArrivals, times: PassTimes
) -> bool:
    """Whether a pass over `tokens` tokens had better wait for a step of a client that has none here.

    Where clients come from several hosts, for one of a host that has none.

    It is a pass of a crowd, of which a part waits in any case, or one over a very small piece of a prompt. If
    it began now it would not be done when that client's step arrives, and would have it wait: the client
    would be served half as often as it could be.
    """
    here = {step.client for step in steps}
    hosts = {client.host for client in here}
    several = len(hosts | {client.host for client, _, _ in expected.clients}) > 1
    alone_s = times.of(tokens)
    return any(
        -alone_s / 2 < in_s < alone_s
        for client, _, in_s in expected.clients
        if (client.host not in hosts if several else client not in here)
    )


def _is_owed_to_others(
    steps: Sequence[WaitingStep],
    scheduled: Sequence[ScheduledTokens],
    owed: Mapping[Holder, Owed],
    pass_s: float,
) -> bool:
    """Whether a pass over steps of crowds had better wait for a client that they owe something.

    It is one that will be back before the pass is done, or is late, but not by more than it is owed. Where
    clients come from several hosts, the clients of one host are a crowd too.
    """
    here = {step.client for step in steps}
    several = len({client.host for client in (*here, *owed)}) > 1
    run = {piece.key for piece in scheduled}
    crowds = {step.client.host if several else step.client for step in steps if step.key not in run}

    def is_of_crowd(client: Holder) -> bool:
        return (client.host if several else client) in crowds

    if not all(map(is_of_crowd, here)):
        return False
    return any(
        not is_of_crowd(client) and one.in_s < pass_s and one.is_worth_waiting for client, one in owed.items()
    )


def worth_waiting(tokens: int, waited_s: float, expected: ExpectedArrivals, times: PassTimes) -> bool:
    """Whether decode steps had better wait a little for others, and run together with them.

    The outputs of a pass leave one after the other, and arrive at the next server so. If the first step began
    there at once, all others would wait for it, and so it would go on, round after round. So a step waits for
    at most half of the time that running together saves; or, if more tokens are expected than wait, for as
    long as it takes by itself, provided that the device then does more in the same time.
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
    tokens: int, waited_s: float, starving: bool, times: PassTimes, limits: PassLimits, more_s: float
) -> int:
    """Tokens of prefill beside `tokens` of decode steps, which have waited for `waited_s`.

    As many as leave the decode steps done within the slowdown's time, counted from their arrival, or `more_s`
    later than without it. If they have used that up by waiting, there are none, until prefill starves.
    """
    alone_s = times.of(tokens)
    allowed_s = max(limits.decode_slowdown * alone_s, alone_s + more_s) - waited_s
    return _chunk(times.tokens_within(allowed_s), tokens, starving, limits)


def _prefill_before(
    expected: ExpectedArrivals, starving: bool, times: PassTimes, limits: PassLimits, more_s: float
) -> int:
    """Tokens of prefill when no decode step is waiting.

    A whole chunk when no session decodes. Else as many as leave the next decode step done within the
    slowdown's time, or `more_s` later, even if it arrives as soon as it may: until then the device has
    nothing else to do, and what is left of the chunk when the step arrives is less than a chunk beside it
    would add. If not even the least chunk fits, there are none, until prefill starves.
    """
    if not expected.tokens:
        return limits.chunk_tokens
    alone_s = times.of(expected.tokens)
    is_late = any(in_s == math.inf for in_s, _ in expected.arrivals)  # and may arrive at any moment
    soonest_s = min(expected.soonest_s, alone_s) if is_late else expected.soonest_s
    later_s = max((limits.decode_slowdown - 1) * alone_s, more_s)
    fitting = times.tokens_within(max(soonest_s, 0.0) + later_s)
    return _chunk(fitting, 0, starving, limits)


def _prefill_before_newcomers(times: PassTimes, limits: PassLimits) -> int:
    """Tokens of prefill when no session decodes, but another client's may begin to at any moment."""
    fitting = times.tokens_within(_NEWCOMER_PASSES * times.of(1))
    return _chunk(fitting, 0, True, limits) if fitting else limits.chunk_tokens


def _chunk(fitting: int, others: int, starving: bool, limits: PassLimits) -> int:
    """Tokens of prefill in a pass with `others`, of which `fitting` in all are done in time.

    The pass's last rows are filled up. If that is too much there are none, unless prefill starves.
    """
    tokens = fitting - fitting % _ROWS - others
    if tokens <= 0:
        tokens = _ROWS - others % _ROWS if starving else 0
    return min(tokens, limits.chunk_tokens)


def _order(step: WaitingStep) -> tuple[bool, ServedBefore]:
    return step.passed_over < _STARVING_TURNS, step.served


def _prefills_in_order(steps: Sequence[WaitingStep], clients: Mapping[Holder, int]) -> list[WaitingStep]:
    """Prefill as it is taken: hosts in turn, the clients of each, and the steps of each.

    A host or client starves if none of its steps has run for long. Of a crowd of prompts most are passed over
    often, which makes none of them urgent beside another client's.

    Args: clients: see `_passed_over_by_client`.
    """
    hosts: dict[str, int] = {}
    for client, passed_over in clients.items():
        hosts[client.host] = min(passed_over, hosts.get(client.host, passed_over))
    return sorted(
        steps,
        key=lambda step: (
            hosts[step.client.host] < _STARVING_TURNS,
            step.served.of_host,
            clients[step.client] < _STARVING_TURNS,
            step.served.of_client,
            step.passed_over < _STARVING_TURNS,
        ),
    )


def _passed_over_by_client(steps: Iterable[WaitingStep]) -> dict[Holder, int]:
    """The turns since one of each client's steps came, or had a part."""
    clients: dict[Holder, int] = {}
    for step in steps:
        clients[step.client] = min(step.passed_over, clients.get(step.client, step.passed_over))
    return clients


class JobTurns:
    """For how many turns jobs of each kind have waited, and when bulk jobs have had their share of time."""

    def __init__(self) -> None:
        self._passed_over = {False: 0, True: 0}
        self._latest = -math.inf, 0.0
        """When the latest bulk job ended, and the seconds that it took."""

    def waiting(
        self, kinds: Iterable[bool], now: float, owed: Mapping[Holder, Owed] = NOTHING_OWED
    ) -> list[WaitingJob]:
        """The jobs that wait, by whether each of them is a bulk job, in order of arrival.

        Args: owed: what others owe clients that they have delayed too much.
        """
        ended, took_s = self._latest
        is_owed = any(one.is_worth_waiting for one in owed.values())
        share = _OWED_BULK_SHARE if is_owed else _BULK_SHARE
        rests = now < ended + took_s * (1 / share - 1)
        return [
            WaitingJob(key, bulk, self._passed_over[bulk], bulk and rests) for key, bulk in enumerate(kinds)
        ]

    def pass_over(self, kinds: Iterable[bool]) -> None:
        """A turn begins while jobs of these kinds wait."""
        for bulk in set(kinds):
            self._passed_over[bulk] += 1

    def ran(self, bulk: bool, began: float, ended: float) -> None:
        """A job was run."""
        self._passed_over[bulk] = 0
        if bulk:
            self._latest = ended, ended - began


@dataclass
class FairShares:
    """Work that each client (or host) has been served, such that it saves nothing up while it is away.

    A client that arrives (or is back) starts from what the least served client present has had: else it would
    take everything until it had caught up with clients that have been here for hours. When no client has
    stayed, none had to wait, and all begin anew.
    """

    _served: dict[str, float] = field(default_factory=dict)
    _present: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        """How many clients are remembered."""
        return len(self._served)

    def __contains__(self, client: str) -> bool:
        return client in self._served

    def of_present(self, clients: Iterable[str]) -> dict[str, float]:
        """What each of these clients, which have work waiting, has been served."""
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
            # A client that has had less than all that are here would be given the floor anyway.
            kept = self._served.items()
            self._served = {client: served for client, served in kept if client in now or served > floor}
        return {client: self._served[client] for client in now}

    def serve(self, client: str, work: float) -> None:
        """Count work that was done for a client."""
        self._served[client] = self._served.get(client, 0.0) + work


class HostShares:
    """Work that each host has been served, and of that each of its clients."""

    def __init__(self) -> None:
        self._hosts = FairShares()
        self._clients: dict[str, FairShares] = {}

    def __len__(self) -> int:
        """How many hosts are remembered."""
        return len(self._clients)

    def of_present(self, clients: Iterable[Holder]) -> dict[Holder, ServedBefore]:
        """What each of these clients, which have work waiting, has been served."""
        here: dict[str, set[str]] = {}
        for client in set(clients):  # a crowd's steps name it many times
            here.setdefault(client.host, set()).add(client.peer)
        of_hosts = self._hosts.of_present(here)
        if len(self._clients) > len(self._hosts):
            self._clients = {host: of for host, of in self._clients.items() if host in self._hosts}
        return {
            Holder(host, peer): ServedBefore(of_hosts[host], served)
            for host, peers in here.items()
            for peer, served in self._clients.setdefault(host, FairShares()).of_present(peers).items()
        }

    def serve(self, client: Holder, work: float) -> None:
        """Count work that was done for a client."""
        self._hosts.serve(client.host, work)
        self._clients.setdefault(client.host, FairShares()).serve(client.peer, work)


class RecentClients:
    """The clients that have decoded in the last seconds, whether or not they have a session now.

    Between two answers a client has none; and one that a crowd has made late would be taken to have left.
    Either way its next step may come at any moment, and then waits for all of what runs just then. A single
    step is no answer: that is how servers and clients try whether a server works.
    """

    _FOR_S = 2.0

    def __init__(self) -> None:
        self._latest: dict[Holder, tuple[float, int, int]] = {}
        """The client that decoded last is the last one."""

    def decoded(self, client: Holder, tokens: int, now: float) -> None:
        """A decode step of a client was done."""
        _, _, before = self._latest.pop(client, (0.0, 0, 0))
        self._latest[client] = now, tokens, before + 1

    def within(self, seconds: float, now: float) -> Set[Holder]:
        """Those that have decoded in the last `seconds`."""
        return {client for client, (done, _, _) in self._latest.items() if done >= now - seconds}

    def at(self, now: float) -> Mapping[Holder, int]:
        """The tokens of the latest step of each of them."""
        while self._latest and (first := next(iter(self._latest.items())))[1][0] < now - self._FOR_S:
            del self._latest[first[0]]
        return {client: tokens for client, (_, tokens, steps) in self._latest.items() if steps > 1}


@dataclass(frozen=True)
class _DecodingSession:
    """A session's latest decode step: when it was done, its tokens, and how long the session stays away."""

    done: float
    tokens: int
    client: Holder
    away_s: Ewma | None
    """Seconds between two decode steps; None: unknown, as it was not away yet, or for too long."""


class ArrivalPredictor:
    """When sessions that decode will have their next step here.

    Between two steps a session is elsewhere: at other servers, or at its client, which chooses the next
    token. A prefill chunk that begins meanwhile is what its next step would have to wait for. That step is
    expected after as long as the session usually stays away; a session that stays away for much longer has
    left. If it is back all the same, as when the next server had it wait behind a chunk of its own, it is
    given more time then.
    """

    _WEIGHT = 0.25  # of the latest time away
    _VARIATIONS = 2  # mean deviations by which a session may be back sooner than usual
    _TIMES_AWAY = 4
    _LEAST_S, _MOST_S = 0.1, 20.0
    _UNKNOWN_S = 2.0
    _MOST_LOOKED_AT = 64
    """Sessions of each client: those that decoded last. A look takes as long however many others it has."""

    def __init__(self) -> None:
        self._sessions: dict[Hashable, _DecodingSession] = {}
        self._by_client: dict[Holder, dict[Hashable, None]] = {}
        """The same, the session that decoded last at the end."""
        self._left: dict[Hashable, _DecodingSession] = {}
        """Sessions that have left, until their time away tells nothing any more."""
        self._due: list[tuple[float, int, Hashable]] = []
        """A heap of when sessions are to be looked at, since they may have left. Some decoded again since."""
        self._numbers = count()
        self._ended: deque[Hashable] = deque(maxlen=1024)  # more than can have decoded since the last look

    def decoded(
        self, session: Hashable, tokens: int, came: float, done: float, client: Holder = NOBODY
    ) -> None:
        """A session's decode step of `tokens` tokens arrived at `came` and was done at `done`."""
        last = self._left.get(session) or self._sessions.get(session)
        usual_s = None
        if last is not None and (away_s := came - last.done) < self._MOST_S:
            usual_s = last.away_s
            if usual_s is None:
                usual_s = Ewma(away_s, away_s / 2, self._WEIGHT)
            else:
                usual_s.observe(away_s)
        self.leave(session)
        self._sessions[session] = one = _DecodingSession(done, tokens, client, usual_s)
        self._by_client.setdefault(client, {})[session] = None
        heapq.heappush(self._due, (self._leaves(one), next(self._numbers), session))

    def leave(self, session: Hashable) -> None:
        """A session does something else than decode."""
        self._left.pop(session, None)
        if (one := self._sessions.pop(session, None)) is not None:
            of_client = self._by_client[one.client]
            del of_client[session]
            if not of_client:
                del self._by_client[one.client]

    def end(self, session: Hashable) -> None:
        """A session has ended. May be called in any thread; it counts from the next look on."""
        self._ended.append(session)

    def sessions_of(self, client: Holder) -> int:
        """How many sessions of a client decode, as far as is known without looking at the time."""
        return len(self._by_client.get(client, ()))

    @property
    def num_ended(self) -> int:
        """Sessions that have ended since the last look."""
        return len(self._ended)

    def has_no_other(self, session: Hashable) -> bool:
        """Whether no other session decodes, as far as is known without looking at the time."""
        return not self._sessions or (len(self._sessions) == 1 and session in self._sessions)

    def expected(self, now: float, here: Container[Hashable] = ()) -> ExpectedArrivals:
        """The next steps of all sessions but those `here`; of a client with a crowd of them, of some."""
        while self._ended:
            self.leave(self._ended.popleft())
        while self._due and self._due[0][0] <= now:
            self._look_at(heapq.heappop(self._due)[2], now)
        away = [(self._back_in(one, now), one) for one in self._away(here)]
        soonest_s = min((in_s - self._variation(one) for in_s, one in away), default=math.inf)
        clients = tuple((one.client, one.tokens, in_s) for in_s, one in away if in_s < math.inf)
        return ExpectedArrivals(tuple(sorted((in_s, one.tokens) for in_s, one in away)), soonest_s, clients)

    def _look_at(self, session: Hashable, now: float) -> None:
        """Take a session to have left if it is time to, and forget it in the end."""
        if (one := self._sessions.get(session)) is not None and self._leaves(one) <= now:
            self.leave(session)
            self._left[session] = one
            heapq.heappush(self._due, (one.done + self._MOST_S, next(self._numbers), session))
        elif (one := self._left.get(session)) is not None and one.done + self._MOST_S <= now:
            del self._left[session]

    def _away(self, here: Container[Hashable]) -> Iterator[_DecodingSession]:
        for of_client in self._by_client.values():
            for session in islice(reversed(of_client), self._MOST_LOOKED_AT):
                if session not in here:
                    yield self._sessions[session]

    def _variation(self, one: _DecodingSession) -> float:
        return 0.0 if one.away_s is None else self._VARIATIONS * one.away_s.deviation

    def _leaves(self, one: _DecodingSession) -> float:
        usual = self._UNKNOWN_S if one.away_s is None else self._TIMES_AWAY * one.away_s.mean
        return one.done + min(max(usual, self._LEAST_S), self._MOST_S)

    def _back_in(self, one: _DecodingSession, now: float) -> float:
        away_s = 0.0 if one.away_s is None else one.away_s.mean
        in_s = one.done + away_s - now
        # An overdue step is worth waiting for as long again; then prefill goes on.
        return in_s if in_s > -away_s else math.inf


@dataclass
class _SimilarPasses:
    """Forward passes over about as many tokens: how many tokens, and how many seconds."""

    tokens: float
    seconds: Ewma


class PassTimes:
    """How long a forward pass over n tokens takes, learned from those that have been.

    Near a + b x n: reading the weights takes a, whatever n is. But only near (few rows of a matrix may take
    another way through a processor than many), so that there is a moving mean for each power of two, and
    straight lines between. Old measurements fade: caches grow, and other programs use the machine.
    """

    _WEIGHT = 0.25  # of a new measurement

    def __init__(self) -> None:
        self._seen: dict[int, _SimilarPasses] = {}  # by power of two

    def learn(self, tokens: int, seconds: float) -> None:
        """A forward pass over `tokens` tokens took `seconds`."""
        power = tokens.bit_length()
        passes = self._seen.get(power)
        if passes is None:
            self._seen[power] = _SimilarPasses(tokens, Ewma(seconds, 0.0, self._WEIGHT))
            return
        passes.tokens += self._WEIGHT * (tokens - passes.tokens)
        # A pass that was held up by something else is not to be believed at once.
        passes.seconds.observe(min(seconds, 4 * passes.seconds.mean))

    def of(self, tokens: float) -> float:
        """Seconds for a pass over `tokens` tokens; 0 before anything was measured.

        For fewer tokens than were ever measured it is less than it will be, lest a first decode step be taken
        for as long as the long prompt before it; for more, as if each token took the same.
        """
        points = self._points(0.0)
        if points and tokens > points[-1][0]:
            return points[-1][1] * tokens / points[-1][0]
        return _interpolated(points, tokens)

    def shortest(self, tokens: int) -> float:
        """As `of`, but for fewer tokens than were ever measured as for the fewest that were."""
        points = self._points(0.0)
        return self.of(max(tokens, points[0][0])) if points else 0.0

    def measured(self) -> tuple[float | None, float]:
        """Seconds of a pass over one token, if there was one, and tokens per second of the longest passes.

        The second is 0 before anything was measured.
        """
        seen = dict(self._seen)  # at once, as in `_points`
        single, longest = seen.get(1), seen[max(seen)] if seen else None
        rate = longest.tokens / longest.seconds.mean if longest and longest.seconds.mean > 0 else 0.0
        return (single.seconds.mean if single and single.seconds.mean > 0 else None), rate

    def tokens_within(self, seconds: float) -> int:
        """Most tokens of a pass that is done in time even if it takes longer than usual by its mean
        deviation.

        0 if not one is, or nothing was measured.
        """
        points = self._points(1.0)
        low, high = 0, 1
        while high < 2**20 and 0 < _interpolated(points, high) <= seconds:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _interpolated(points, middle) <= seconds else (low, middle)
        return low

    def _points(self, deviations: float) -> list[tuple[float, float]]:
        """Tokens, and seconds with so many deviations."""
        # The event loop asks while the engine's thread learns; the list is made at once.
        seen = list(self._seen.values())
        return sorted((one.tokens, one.seconds.mean + deviations * one.seconds.deviation) for one in seen)


def _interpolated(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """Seconds for `tokens` tokens on the lines between `points`, from (0, 0) on; 0 without any.

    The last line goes on, but at least half as steep as from (0, 0): a line through two points is not to be
    believed far.
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
