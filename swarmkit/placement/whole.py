"""Placing all servers at once, where one program may decide for all. Pure.

Two goals. Where the demand is not known the placement carries as many tokens per second as possible
(`supply.greatest_rate`). Where it is, an answer takes as little time as possible on average, waiting included
(`chains.expected_answer_s`): for every number of sessions whose caches might be reserved, servers are chained
fastest first (the algorithm 1 of arXiv 2604.14993) and placed on the weakest blocks, and the best is taken.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarmkit.errors import UsageError
from swarmkit.placement.chains import (
    MachineSpan,
    compose_chains,
    expected_answer_s,
    sessions_per_s,
    visit_s,
)
from swarmkit.placement.description import Demand, Machine, ModelSize, Served, blocks_that_fit
from swarmkit.placement.petals import weakest_window
from swarmkit.placement.supply import carries, greatest_rate, greatest_rate_of_any

_EFFORT = 4000
"""Placements that are looked at, where every placement may be."""
_SMALL = 64
"""Servers up to which a placement is improved step by step; with more, every choice matters little."""
_MOST_RESERVED = 512
"""Sessions that are reserved at most."""


@dataclass(frozen=True)
class WholePlan:
    """A placement of all machines, and what is expected of it.

    Attributes:
        placed: in the order of the machines; None for one that is not needed or holds not one block.
        reserved: sessions whose caches each server keeps room for.
        answer_s: mean seconds of an answer; inf where the demand is not known, or too high.
        rate: tokens per second that it carries at most.
    """

    placed: tuple[MachineSpan | None, ...]
    reserved: int
    answer_s: float
    rate: float


def plan_placement(
    machines: Sequence[Machine],
    model: ModelSize,
    demand: Demand | None = None,
    *,
    seed: int = 0,
    effort: int = _EFFORT,
) -> WholePlan:
    """Place every machine.

    Args:
        seed: of what is drawn where not all placements can be looked at.
        effort: how many placements are looked at, at most.

    Raises:
        UsageError: the machines together cannot hold the model.
    """
    demand = demand or Demand()
    if sum(blocks_that_fit(one, model, demand.reserved_tokens) for one in machines) < model.num_blocks:
        raise UsageError(f"these {len(machines)} machines cannot hold {model.num_blocks} blocks together")
    if not demand.arrivals_per_s:
        return _for_rate(machines, model, demand, seed, effort)
    return _for_answers(machines, model, demand)


# ---------------------------------------------------------------------- as many tokens per second as possible


def _for_rate(
    machines: Sequence[Machine], model: ModelSize, demand: Demand, seed: int, effort: int
) -> WholePlan:
    counts = [blocks_that_fit(one, model, demand.reserved_tokens) for one in machines]
    work = [one.rate(max(count, 1)) * count for one, count in zip(machines, counts, strict=True)]
    usable = [number for number, count in enumerate(counts) if count]
    bound = greatest_rate_of_any(model.num_blocks, [(counts[number], work[number]) for number in usable])
    search = _RateSearch(
        model.num_blocks, [counts[n] for n in usable], [work[n] for n in usable], random.Random(seed), bound
    )
    starts = search.run(effort if len(usable) <= _SMALL else 0)
    placed: list[MachineSpan | None] = [None] * len(machines)
    for number, start in zip(usable, starts, strict=True):
        placed[number] = MachineSpan(machines[number], start, start + counts[number])
    return WholePlan(tuple(placed), 1, math.inf, search.rate)


class _RateSearch:
    """Iterated local search over the starts of servers whose numbers of blocks are given."""

    def __init__(
        self,
        num_blocks: int,
        counts: Sequence[int],
        work: Sequence[float],
        chance: random.Random,
        bound: float,
    ) -> None:
        self._num_blocks, self._counts, self._work = num_blocks, counts, work
        self._chance, self._bound = chance, bound
        self._left = 0
        self.rate = 0.0
        """Of the best placement so far."""

    def run(self, effort: int) -> list[int]:
        """The best starts found after looking at so many placements, or soon after."""
        self._left = effort
        firsts = [self._greedy(order) for order in self._orders()]
        best = max(firsts, key=self._rate)
        self.rate = self._rate(best)
        current, rate = self._climb(list(best), self.rate)
        best, self.rate = list(current), rate
        while self._left > 0 and self.rate < self._bound * (1 - 1e-9):
            trial = self._shaken(best)
            trial, rate = self._climb(trial, self._rate(trial))
            if rate > self.rate * (1 + 1e-12):
                best, self.rate = list(trial), rate
        return best

    def _orders(self) -> list[list[int]]:
        """Orders in which servers are placed: those with much work first, and those with many blocks."""
        numbers = range(len(self._counts))
        return [
            sorted(numbers, key=lambda n: -self._work[n] / self._counts[n]),
            sorted(numbers, key=lambda n: -self._counts[n]),
            sorted(numbers, key=lambda n: -self._work[n]),
        ]

    def _greedy(self, order: Sequence[int]) -> list[int]:
        totals = np.zeros(self._num_blocks)
        starts = [0] * len(order)
        for number in order:
            start, stop = weakest_window(totals, self._counts[number])
            starts[number] = start
            totals[start:stop] += self._work[number] / self._counts[number]
        return starts

    def _served(self, starts: Sequence[int]) -> list[Served]:
        return [
            Served(start, start + count, work / count)
            for start, count, work in zip(starts, self._counts, self._work, strict=True)
        ]

    def _rate(self, starts: Sequence[int]) -> float:
        return greatest_rate(self._num_blocks, self._served(starts))

    def _beats(self, starts: Sequence[int], rate: float) -> bool:
        self._left -= 1
        least = rate * (1 + 1e-9) if rate else 1e-12
        return carries(least, self._num_blocks, self._served(starts))

    def _climb(self, starts: list[int], rate: float) -> tuple[list[int], float]:
        """Move one server, or let two change places, as long as that is better."""
        better = True
        while better and self._left > 0:
            better = False
            for trial in self._neighbours(starts):
                if self._left <= 0:
                    break
                if self._beats(trial, rate):
                    starts, rate, better = trial, self._rate(trial), True
                    break
        return starts, rate

    def _neighbours(self, starts: Sequence[int]) -> list[list[int]]:
        found = []
        for number, count in enumerate(self._counts):
            for start in range(self._num_blocks - count + 1):
                if start != starts[number]:
                    found.append([*starts[:number], start, *starts[number + 1 :]])
        for one in range(len(starts)):
            for other in range(one):
                trial = list(starts)
                trial[one] = min(starts[other], self._num_blocks - self._counts[one])
                trial[other] = min(starts[one], self._num_blocks - self._counts[other])
                found.append(trial)
        self._chance.shuffle(found)
        return found

    def _shaken(self, starts: Sequence[int]) -> list[int]:
        trial = list(starts)
        for number in self._chance.sample(range(len(trial)), min(3, len(trial))):
            trial[number] = self._chance.randint(0, self._num_blocks - self._counts[number])
        return trial


# ---------------------------------------------------------------------- answers as soon as possible


def _for_answers(machines: Sequence[Machine], model: ModelSize, demand: Demand) -> WholePlan:
    best: WholePlan | None = None
    for sessions in _reservations(machines, model, demand):
        counts = [blocks_that_fit(one, model, sessions * demand.reserved_tokens) for one in machines]
        if sum(counts) < model.num_blocks:
            break
        for build in (_chained, _strengthened):
            spans = build(machines, counts, model, demand)
            found = _judged(machines, spans, sessions, model, demand)
            if best is None or _better(found, best):
                best = found
    assert best is not None
    return best


def _reservations(machines: Sequence[Machine], model: ModelSize, demand: Demand) -> list[int]:
    """1, 2, 3, … sessions, further apart as they grow: as many as any machine holds beside one block."""
    most = max(
        (one.memory_bytes - model.block_bytes) / max(demand.reserved_tokens * model.token_bytes, 1e-9)
        for one in machines
    )
    found, sessions = [], 1
    while sessions <= max(1, min(most, _MOST_RESERVED)):
        found.append(sessions)
        sessions = max(sessions + 1, int(sessions * 1.15))
    return found


Spans = list[tuple[int, int, int]]


def _chained(machines: Sequence[Machine], counts: Sequence[int], model: ModelSize, demand: Demand) -> Spans:
    """Chains of servers, fastest first; what is left in the end strengthens the weakest blocks."""
    order = _by_speed(machines, counts, demand)
    spans: Spans = []
    position, begun = 0, 0
    for number in order:
        start = min(position, model.num_blocks - counts[number])
        spans.append((number, start, start + counts[number]))
        position = start + counts[number]
        if position >= model.num_blocks:
            position, begun = 0, len(spans)
    if begun == len(spans):
        return spans
    return _onto_weakest(machines, counts, model, spans[:begun], [n for n, *_ in spans[begun:]])


def _strengthened(
    machines: Sequence[Machine], counts: Sequence[int], model: ModelSize, demand: Demand
) -> Spans:
    """Every server on the blocks that are weakest, fastest first."""
    return _onto_weakest(machines, counts, model, [], _by_speed(machines, counts, demand))


def _by_speed(machines: Sequence[Machine], counts: Sequence[int], demand: Demand) -> list[int]:
    usable = [number for number, count in enumerate(counts) if count]
    return sorted(usable, key=lambda n: (visit_s(machines[n], counts[n], demand) / counts[n], n))


def _onto_weakest(
    machines: Sequence[Machine],
    counts: Sequence[int],
    model: ModelSize,
    spans: Spans,
    numbers: Sequence[int],
) -> Spans:
    totals = np.zeros(model.num_blocks)
    found = list(spans)
    for number, start, stop in spans:
        totals[start:stop] += machines[number].rate(stop - start)
    for number in numbers:
        start, stop = weakest_window(totals, counts[number])
        totals[start:stop] += machines[number].rate(stop - start)
        found.append((number, start, stop))
    return found


def _judged(
    machines: Sequence[Machine], spans: Spans, reserved: int, model: ModelSize, demand: Demand
) -> WholePlan:
    placed: list[MachineSpan | None] = [None] * len(machines)
    for number, start, stop in spans:
        placed[number] = MachineSpan(machines[number], start, stop)
    chains = compose_chains([one for one in placed if one is not None], model, demand)
    answer_s = expected_answer_s(chains, demand.arrivals_per_s)
    return WholePlan(tuple(placed), reserved, answer_s, sessions_per_s(chains) * demand.answer_tokens)


def _better(one: WholePlan, other: WholePlan) -> bool:
    if math.isinf(one.answer_s) and math.isinf(other.answer_s):
        return one.rate > other.rate
    return one.answer_s < other.answer_s
