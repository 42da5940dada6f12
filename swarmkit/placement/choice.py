"""Our own rule: which blocks a newcomer serves, and when one that serves goes elsewhere. Pure.

The rule of Petals fills a server's memory with blocks, so that requests wait for cache, and counts nothing
but throughput. This one also reserves cache for the sessions that are open at a time at the measured arrival
rate (Little's law; the reservation is that of Sun et al., arXiv 2512.21884, with the rate taken into account
as in arXiv 2604.14993), counts a server for no more sessions than its caches have room for, and prefers,
among windows that are as good for the swarm's throughput, the one that makes the best route fastest.

What a window is worth is the fall of a potential, the sum over all blocks of T[b] ** -2, where T[b] is what
the block's servers carry: weak blocks weigh most. A server that moves makes the potential smaller by a set
share at least, so that moves end, whoever makes them in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarmkit.errors import UsageError
from swarmkit.placement.description import Demand, Machine, ModelSize, Served, blocks_that_fit, cache_tokens
from swarmkit.placement.latency import Floats, RouteTimes
from swarmkit.placement.supply import cached_rate

_POWER = 2


@dataclass(frozen=True, kw_only=True)
class PlacementPolicy:
    """How the rule decides.

    Attributes:
        headroom: the swarm is to carry so many times the measured demand, so that requests do not wait.
        least_gain: a server moves where its work is so much scarcer, as a share; measurements differ by less.
        horizon_s: a server is expected to stay for so long; a move must bring more then than it costs.
        equal: worths that differ by less than this share are equal, and the best route's time decides.
    """

    headroom: float = 1.5
    least_gain: float = 0.2
    horizon_s: float = 3600.0
    equal: float = 0.02


@dataclass(frozen=True)
class PlacementMove:
    """A server's better place.

    Attributes:
        start, stop: the blocks to serve, [start, stop).
        gain: how many times as scarce its work is there; inf if blocks without a server get one.
        reason: in words, for people.
    """

    start: int
    stop: int
    gain: float
    reason: str


@dataclass(frozen=True)
class _Windows:
    """What each window of `count` blocks is worth to the swarm, by its start."""

    count: int
    covered: Floats
    """Blocks that have a server then."""
    worth: Floats
    """The fall of the potential, of blocks that carry less than is needed."""
    surplus: Floats
    """The fall of the potential of all blocks."""
    route_s: Floats
    """Seconds of a token over the best route."""

    def at(self, start: int) -> tuple[float, float, float, float]:
        return (
            float(self.covered[start]),
            float(self.worth[start]),
            float(self.route_s[start]),
            float(self.surplus[start]),
        )


def choose(
    machine: Machine,
    others: Sequence[Served],
    model: ModelSize,
    demand: Demand | None = None,
    policy: PlacementPolicy | None = None,
    *,
    count: int | None = None,
) -> tuple[int, int]:
    """The blocks [start, stop) that a newcomer is to serve.

    In this order: as many blocks as possible have a server; those that carry less than the demand with
    headroom are strengthened, the weakest first (where the demand is not known: all); the best route is fast;
    the weakest blocks are strengthened.

    Args:
        others: those that serve or are about to.
        count: serve exactly so many blocks; None = as many as leave room for the caches of the sessions that
            are expected.

    Raises:
        UsageError: not one block fits, or `count` is not in 1..num_blocks.
    """
    look = _Look(machine, others, model, demand or Demand(), policy or PlacementPolicy())
    counts = [count] if count is not None else look.counts()
    if not 1 <= min(counts) <= max(counts) <= model.num_blocks:
        raise UsageError(f"a server can hold 1 to {model.num_blocks} blocks of this model, not {min(counts)}")
    windows, start = look.best(counts)
    return start, start + windows.count


def should_move(
    machine: Machine,
    own: Served,
    others: Sequence[Served],
    model: ModelSize,
    demand: Demand | None = None,
    policy: PlacementPolicy | None = None,
    *,
    move_s: float = 60.0,
    count: int | None = None,
) -> PlacementMove | None:
    """A better place for a server that serves `own`, or None if it had better stay.

    It stays if a block would lose its only server without more of them gaining one, if its work is not
    scarcer elsewhere by `least_gain`, and if that is worth less than the work that it does not do while it
    moves.

    Args:
        others: all servers but this one.
        move_s: seconds in which the server does not serve: the new blocks are fetched and loaded.
        count: serve exactly so many blocks; None = as many as now, or as many as leave room for caches.
    """
    policy = policy or PlacementPolicy()
    look = _Look(machine, others, model, demand or Demand(), policy)
    counts = [count] if count is not None else sorted({own.blocks, *look.counts()})
    windows, start = look.best(counts)
    stop = start + windows.count
    if (start, stop) == (own.start, own.stop):
        return None
    held, worth, route_s, surplus = look.windows(own.blocks).at(own.start)
    covered, better_worth, better_route_s, better_surplus = windows.at(start)
    if covered != held:
        if covered < held:
            return None
        return PlacementMove(start, stop, math.inf, f"{covered - held:.0f} more blocks have a server there")
    if held < model.num_blocks:
        return None  # no route either way
    least = least_gain(policy, move_s)
    gain = _scarcity(better_worth, worth)
    if gain >= least:
        return PlacementMove(start, stop, gain, f"its work is {gain:.2f} times as scarce there")
    faster = route_s / max(better_route_s, 1e-12)
    keeps = better_worth >= worth * (1 - policy.equal)
    if keeps and faster >= least:
        return PlacementMove(start, stop, faster, f"the best route is {faster:.2f} times as fast")
    gain = _scarcity(better_surplus, surplus)
    if not better_worth and not worth and gain >= least and better_route_s <= route_s * (1 + policy.equal):
        return PlacementMove(start, stop, gain, f"its work is {gain:.2f} times as scarce there")
    return None


def least_gain(policy: PlacementPolicy, move_s: float) -> float:
    """How many times as scarce a server's work has to be elsewhere for a move that takes so many seconds."""
    lost = move_s / policy.horizon_s
    return max(1 + policy.least_gain, (1 + lost) / max(1 - lost, 1e-9))


def _scarcity(there: float, here: float) -> float:
    """How many times as scarce a server's work is, from the falls of the potential.

    The fall is the potential's slope, to first order, which is the power -3 of what blocks carry.
    """
    if here <= 0:
        return 1.0 if there <= 0 else math.inf
    return float((there / here) ** (1 / (_POWER + 1)))


def reserved_sessions(
    machine: Machine, blocks: int, demand: Demand, policy: PlacementPolicy, token_s: float
) -> int:
    """How many sessions' caches a server reserves, if it serves so many blocks.

    As many as are open at a time at the demand's rate with headroom, but no more than its work allows; one at
    least.

    Args: token_s: seconds of a token over a route, of which an answer takes its number of tokens.
    """
    wanted = policy.headroom * demand.sessions(demand.answer_tokens * token_s)
    return max(1, math.ceil(min(wanted, machine.rate(blocks) * token_s) - 1e-9))


class _Look:
    """The swarm as one server sees it that decides."""

    def __init__(
        self,
        machine: Machine,
        others: Sequence[Served],
        model: ModelSize,
        demand: Demand,
        policy: PlacementPolicy,
    ) -> None:
        self._machine, self._model, self._demand, self._policy = machine, model, demand, policy
        self._times = RouteTimes(model.num_blocks, others)
        self._token_s = self._times.seconds
        if not math.isfinite(self._token_s):  # as if all others were like this one
            most = max(1, blocks_that_fit(machine, model, demand.reserved_tokens))
            self._token_s = (machine.way_s / most + machine.decode_s) * model.num_blocks
        self._held = np.zeros(model.num_blocks, dtype=bool)
        self._totals = np.zeros(model.num_blocks)
        for one in others:
            span = slice(max(0, one.start), max(0, min(one.stop, model.num_blocks)))
            self._held[span] = True
            self._totals[span] += min(one.throughput, self._cached_rate(one.cache_tokens))
        self._least_rate = self._rate(max(1, blocks_that_fit(machine, model, demand.reserved_tokens)))

    def _cached_rate(self, tokens: float) -> float:
        demand = self._demand
        if not demand.arrivals_per_s:
            return math.inf  # how long sessions are is not known either
        return cached_rate(tokens, demand, demand.answer_tokens * self._token_s)

    def _rate(self, count: int) -> float:
        """Tokens per second that this server adds to so many blocks."""
        caches = cache_tokens(self._machine, count, self._model)
        return min(self._machine.rate(count), self._cached_rate(caches))

    def counts(self) -> list[int]:
        """Numbers of blocks worth looking at: the most at all, the most beside the caches reserved, and some
        with more room for caches.
        """
        machine, model, demand = self._machine, self._model, self._demand
        most = blocks_that_fit(machine, model, demand.reserved_tokens)
        if not most:
            raise UsageError("not one block fits into this machine's memory beside the cache of one session")
        if not demand.arrivals_per_s:
            return [most]
        found = {most, 3 * most // 4, most // 2, most // 4, 1} - {0}
        for blocks in range(most, 0, -1):
            sessions = reserved_sessions(machine, blocks, demand, self._policy, self._token_s)
            if blocks_that_fit(machine, model, sessions * demand.reserved_tokens) >= blocks:
                found.add(blocks)
                break
        return sorted(found)

    def windows(self, count: int) -> _Windows:
        """What windows of `count` blocks are worth."""
        machine, demand, policy = self._machine, self._demand, self._policy
        rate = self._rate(count)
        needed = policy.headroom * demand.arrivals_per_s * demand.answer_tokens or math.inf
        before = np.maximum(self._totals, 1e-9 * max(rate, 1e-9))
        if demand.arrivals_per_s:
            # Windows of several sizes are compared, and a block without a server counts for as much in each.
            # Beside next to nothing, the slowest window would be worth the most.
            before = np.where(self._held, before, max(self._least_rate, 1e-9))
        surplus = before**-_POWER - (before + rate) ** -_POWER
        lacking = np.where(before < needed, surplus, 0.0)

        def sums(values: Floats) -> Floats:
            return np.lib.stride_tricks.sliding_window_view(values, count).sum(axis=1)

        return _Windows(
            count,
            self._held.sum() + sums((~self._held).astype(np.float64)),
            sums(lacking),
            sums(surplus),
            self._times.with_one_more(count, machine.way_s, machine.decode_s),
        )

    def best(self, counts: Sequence[int]) -> tuple[_Windows, int]:
        """The best window of some sizes."""
        equal = self._policy.equal
        found = [self.windows(count) for count in counts]
        offsets = np.cumsum([0, *(len(one.worth) for one in found)])
        covered, worth, surplus, route_s = (
            np.concatenate([getattr(one, name) for one in found])
            for name in ("covered", "worth", "surplus", "route_s")
        )
        left = np.flatnonzero(covered == covered.max())
        left = left[worth[left] >= worth[left].max() * (1 - equal)]
        left = left[route_s[left] <= route_s[left].min() * (1 + equal)]
        chosen = int(left[surplus[left].argmax()])
        which = int(np.searchsorted(offsets, chosen, side="right")) - 1
        return found[which], chosen - int(offsets[which])
