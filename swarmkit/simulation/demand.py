"""Requests and machines that come and go: from generators, or from files."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from swarmkit.errors import UsageError


@dataclass(frozen=True)
class SimulatedRequest:
    """A request: when it comes, in seconds, and how many tokens its prompt and its answer have."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int


def poisson_requests(
    rate: float,
    count: int,
    chance: random.Random,
    *,
    prompt_tokens: int = 128,
    answer_tokens: int = 128,
    spread: bool = False,
) -> list[SimulatedRequest]:
    """So many requests that come independently of each other, `rate` a second.

    Args: spread: draw lengths (exponentially, around the given ones) rather than give all the same.
    """
    found, now = [], 0.0
    for _ in range(count):
        now += chance.expovariate(rate)
        prompt, answer = prompt_tokens, answer_tokens
        if spread:
            prompt = max(1, round(chance.expovariate(1 / prompt_tokens)))
            answer = max(1, round(chance.expovariate(1 / answer_tokens)))
        found.append(SimulatedRequest(now, prompt, answer))
    return found


def read_requests(path: Path, count: int | None = None) -> list[SimulatedRequest]:
    """Requests from a table (CSV) with `TIMESTAMP`, `ContextTokens` and `GeneratedTokens`, as Azure's traces.

    Args: count: the first so many only.

    Raises:
        UsageError: it is not such a table.
    """
    found: list[SimulatedRequest] = []
    start: datetime | None = None
    try:
        with path.open() as file:
            for row in csv.DictReader(file):
                when = datetime.fromisoformat(row["TIMESTAMP"][:26])
                start = start or when
                found.append(
                    SimulatedRequest(
                        (when - start).total_seconds(),
                        max(1, int(row["ContextTokens"])),
                        max(1, int(row["GeneratedTokens"])),
                    )
                )
                if len(found) == count:
                    break
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is not a table of requests: {error}") from error
    if not found:
        raise UsageError(f"{path} has no requests")
    return found


@dataclass(frozen=True)
class PopulationChange:
    """At `at_s` seconds so many machines come (positive) or go (negative)."""

    at_s: float
    change: int


def read_churn(path: Path) -> list[PopulationChange]:
    """Changes from a table (CSV) of seconds and running machines, in which each change is two lines.

    Raises:
        UsageError: it is not such a table.
    """
    found, running = [], 0
    try:
        for line in path.read_text().split():
            at_s, now = line.split(",")
            if int(now) != running:
                found.append(PopulationChange(float(at_s), int(now) - running))
                running = int(now)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a table of running machines: {error}") from error
    return found


def random_churn(
    per_hour: float, population: int, duration_s: float, chance: random.Random
) -> Iterator[PopulationChange]:
    """One machine goes and another one comes, at random times: a share of the population each hour."""
    now = 0.0
    while per_hour > 0:
        now += chance.expovariate(per_hour * population / 3600)
        if now > duration_s:
            return
        yield PopulationChange(now, -1)
        yield PopulationChange(now, 1)


def mean_of(values: Sequence[float]) -> float:
    """0 of none."""
    return sum(values) / len(values) if values else 0.0


def quantile_of(values: Sequence[float], share: float) -> float:
    """The value below which that share of all lies; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
