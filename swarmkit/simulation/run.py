"""One simulation from beginning to end, and what it found."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import anyio

from swarmkit.errors import UsageError, unwrapped
from swarmkit.placement.description import Demand
from swarmkit.settings import ClientSettings
from swarmkit.simulation.demand import (
    PopulationChange,
    SimulatedRequest,
    mean_of,
    poisson_requests,
    quantile_of,
    random_churn,
    read_churn,
    read_requests,
)
from swarmkit.simulation.distances import Distances, read_topology, scattered
from swarmkit.simulation.hardware import HARDWARE, MODELS, draw_kinds, machine_of
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.petals_client import PetalsRouter
from swarmkit.simulation.rules import OurRule, PetalsRule, PlacementRule
from swarmkit.simulation.swarm import SimulatedSwarm, SwarmHistory
from swarmkit.simulation.virtual_time import VirtualClock, run_virtually

RuleName = Literal["ours", "petals"]
OnProgress = Callable[[str, float, float], None]
"""Called with what happens, how much of it is done, and how much there is."""

_JOIN_S = 120.0
_MOST_WARM_UP_S = 3600.0
_SAMPLE_S = 60.0


def _quiet(what: str, done: float, total: float) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class SimulationSetup:
    """What is simulated.

    Attributes:
        model: one of `hardware.MODELS`.
        servers: that are there at the beginning; a trace has its own numbers.
        mix: proportions of kinds of hardware (`hardware.HARDWARE`).
        clients: that the requests come from, in turns.
        rate, requests: requests per second, and how many; 0 requests = none.
        prompt_tokens, answer_tokens: mean lengths, drawn anew for each request.
        hours: how long servers come and go; requests that are under way are answered.
        churn_per_hour: which share of the servers goes in an hour, and as many come.
        trace, demand, topology: a table of running machines, instead of churn; one of requests; distances.
        stretch: requests of the table come so many times as slowly.
        rule: of placement, and of the clients' choice of servers.
        seed: of everything that is drawn.
    """

    model: str = "llama-2-70b"
    servers: int = 100
    mix: Mapping[str, float] = field(
        default_factory=lambda: {"a100": 1, "rtx4090": 2, "rtx3090": 3, "rtx3060": 2, "t4": 2}
    )
    clients: int = 8
    rate: float = 0.5
    requests: int = 200
    prompt_tokens: int = 256
    answer_tokens: int = 128
    hours: float = 1.0
    churn_per_hour: float = 0.1
    trace: Path | None = None
    demand: Path | None = None
    stretch: float = 1.0
    topology: Path | None = None
    rule: RuleName = "ours"
    assumptions: SwarmAssumptions = field(default_factory=SwarmAssumptions)
    seed: int = 0


def simulate(setup: SimulationSetup, on_progress: OnProgress = _quiet) -> SwarmHistory:
    """Let a swarm live in virtual time; the same setup gives the same history.

    Raises:
        UsageError: a model, a kind of hardware or a file is not known.
    """
    if setup.model not in MODELS:
        raise UsageError(f"no model is called {setup.model}; there are {', '.join(MODELS)}")
    with unwrapped():
        return run_virtually(lambda clock: _Simulation(setup, clock, on_progress).run())


class _Simulation:
    def __init__(self, setup: SimulationSetup, clock: VirtualClock, on_progress: OnProgress) -> None:
        self._setup, self._clock, self._on_progress = setup, clock, on_progress
        self._chance = random.Random(setup.seed)
        self._model = MODELS[setup.model]
        self._number = 0
        self._changes = self._read_changes()
        self._requests = self._read_requests()
        coming = sum(max(0, change.change) for change in self._changes)
        places = setup.clients + (0 if setup.trace else setup.servers) + coming
        self._distances = self._read_distances(places)
        draw_kinds(setup.mix, 0, self._chance)  # complains about unknown kinds before anything runs

    def _read_changes(self) -> list[PopulationChange]:
        setup = self._setup
        if setup.trace is not None:
            changes = read_churn(setup.trace)
            first = changes[0].at_s if changes else 0.0
            kept = [PopulationChange(one.at_s - first, one.change) for one in changes]
            return [one for one in kept if one.at_s <= setup.hours * 3600]
        chance = random.Random(f"churn {setup.seed}")
        return list(random_churn(setup.churn_per_hour, setup.servers, setup.hours * 3600, chance))

    def _read_requests(self) -> list[SimulatedRequest]:
        setup = self._setup
        if not setup.requests:
            return []
        if setup.demand is not None:
            found = read_requests(setup.demand, setup.requests)
            return [replace(one, at_s=one.at_s * setup.stretch) for one in found]
        return poisson_requests(
            setup.rate,
            setup.requests,
            random.Random(f"demand {setup.seed}"),
            prompt_tokens=setup.prompt_tokens,
            answer_tokens=setup.answer_tokens,
            spread=True,
        )

    def _read_distances(self, places: int) -> Distances:
        if self._setup.topology is not None:
            return read_topology(self._setup.topology, places, self._chance)
        return scattered(places, self._chance)

    def _rule(self) -> PlacementRule:
        size = self._model.size
        if self._setup.rule == "petals":
            return PetalsRule(size, random.Random(f"petals {self._setup.seed}"))
        requests = self._requests
        if not requests:
            return OurRule(size)
        prompt = mean_of([one.prompt_tokens for one in requests])
        answer = mean_of([one.answer_tokens for one in requests])
        span = max(requests[-1].at_s - requests[0].at_s, 1.0)
        return OurRule(
            size,
            Demand(
                arrivals_per_s=len(requests) / span,
                prompt_tokens=prompt,
                answer_tokens=answer,
                most_tokens=self._setup.assumptions.reserved_tokens,
            ),
        )

    async def run(self) -> SwarmHistory:
        setup = self._setup
        async with anyio.create_task_group() as tasks:
            swarm = SimulatedSwarm(
                self._model,
                self._distances,
                self._rule(),
                setup.assumptions,
                self._clock,
                tasks,
                seed=setup.seed,
            )
            self._swarm = swarm
            if setup.trace is None:
                await self._warm_up()
            else:
                tasks.start_soon(self._come_and_go)
                await self._until_covered()
            tasks.start_soon(swarm.sample_forever, _SAMPLE_S)
            if setup.trace is None:
                tasks.start_soon(self._come_and_go)
            until = self._clock.now() + setup.hours * 3600
            clients = [self._client(number) for number in range(setup.clients)]
            await swarm.answer_all(
                self._requests, clients, lambda done, total: self._on_progress("answers", done, total)
            )
            while self._clock.now() < until:
                await anyio.sleep(min(_SAMPLE_S, max(until - self._clock.now(), 0.001)))
                done_s = setup.hours * 3600 - (until - self._clock.now())
                self._on_progress("hours", done_s / 3600, setup.hours)
            history = swarm.finish()
            tasks.cancel_scope.cancel()
        return history

    async def _warm_up(self) -> None:
        """All servers join in a random order, and load their blocks."""
        for number in range(self._setup.servers):
            self._join()
            await anyio.sleep(self._chance.uniform(0, 2 * _JOIN_S / self._setup.servers))
            self._on_progress("servers", number + 1, self._setup.servers)
        await self._until_covered()
        give_up_at = self._clock.now() + _MOST_WARM_UP_S
        while len(self._swarm.online()) < len(self._swarm.servers):
            if self._clock.now() > give_up_at:
                break
            await anyio.sleep(10.0)
        await anyio.sleep(2 * min(self._setup.assumptions.look_period_s, _MOST_WARM_UP_S / 2))

    async def _until_covered(self) -> None:
        give_up_at = self._clock.now() + _MOST_WARM_UP_S
        while not self._swarm.is_covered() and self._clock.now() < give_up_at:  # noqa: ASYNC110
            await anyio.sleep(1.0)
        if not self._swarm.is_covered():
            raise UsageError(
                f"{self._swarm.missing()} of {self._model.size.num_blocks} blocks have no server: "
                "simulate more servers, or larger ones"
            )

    def _join(self) -> None:
        (kind,) = draw_kinds(self._setup.mix, 1, self._chance)
        place = (self._setup.clients + self._number) % self._distances.places
        speed = self._chance.uniform(0.4, 0.8)
        near = min(self._setup.clients, self._distances.places)
        ways = [self._distances.seconds(client, place) for client in range(near)]
        machine = machine_of(
            kind,
            self._model,
            f"{kind.name}-{self._number:04}",
            way_s=self._setup.assumptions.overhead_s + mean_of(ways),
            speed=speed,
        )
        self._number += 1
        self._swarm.join(machine, place)

    def _client(self, number: int) -> Any:
        place = number % self._distances.places
        if self._setup.rule == "petals":
            swarm = self._swarm
            router = PetalsRouter(place, swarm.look_up, swarm.servers.get, self._distances, self._clock)
            return swarm.client(place, router)
        return self._swarm.client(place, settings=ClientSettings())

    async def _come_and_go(self) -> None:
        start = self._clock.now()
        for change in self._changes:
            await anyio.sleep(max(0.0, start + change.at_s - self._clock.now()))
            for _ in range(max(0, change.change)):
                self._join()
            names = sorted(name for name, one in self._swarm.servers.items() if one.state != "leaving")
            for name in self._chance.sample(names, min(len(names), max(0, -change.change))):
                self._swarm.leave(name)


def summary(setup: SimulationSetup, history: SwarmHistory) -> dict[str, Any]:
    """What a simulation found, for people and programs."""
    answers = history.answers
    good = [one for one in answers if not one.lost]
    samples = history.samples
    ratios = [one.rate / one.bound for one in samples if one.bound]
    return {
        "model": setup.model,
        "rule": setup.rule,
        "seed": setup.seed,
        "hours": setup.hours,
        "servers": round(mean_of([one.servers for one in samples]), 1) if samples else setup.servers,
        "moves": history.moves,
        "rate_to_bound": _rounded(mean_of(ratios)),
        "rate_to_bound_least": _rounded(min(ratios, default=0.0)),
        "gaps": len(history.gaps),
        "longest_gap_s": _rounded(max((until - since for since, until in history.gaps), default=0.0)),
        "answers": len(good),
        "turned_away": sum(one.lost and not one.begun for one in answers),
        "lost": sum(one.lost and one.begun for one in answers),
        "lost_while_covered": sum(one.lost and one.begun and not one.uncovered for one in answers),
        "replaced": sum(one.replaced for one in answers),
        "answer_s": _spread([one.total_s for one in good]),
        "waited_s": _spread([one.waited_s for one in good]),
        "first_token_s": _spread([one.first_token_s for one in good]),
        "seconds_per_token": _rounded(mean_of([one.total_s / one.request.answer_tokens for one in good])),
        "waiting_to_answer": _rounded(
            sum(one.waited_s for one in good) / max(sum(one.total_s for one in good), 1e-9)
        ),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": _rounded(mean_of(values)),
        "median": _rounded(quantile_of(values, 0.5)),
        "p95": _rounded(quantile_of(values, 0.95)),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def parse_mix(text: str) -> dict[str, float]:
    """Read proportions such as `a100=1,t4=3`.

    Raises:
        UsageError: it is not such a list.
    """
    try:
        mix = {}
        for part in text.split(","):
            name, _, share = part.partition("=")
            mix[name.strip()] = float(share or 1)
    except ValueError:
        raise UsageError(f"a mix is written NAME=SHARE,…, as in a100=1,t4=3; got {text!r}") from None
    if unknown := set(mix) - set(HARDWARE):
        raise UsageError(
            f"no hardware is called {', '.join(sorted(unknown))}; there are {', '.join(HARDWARE)}"
        )
    return mix
