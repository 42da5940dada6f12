"""Swarms with a given placement in virtual time, for the rows of `placement.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio

from swarmkit.placement.description import Machine
from swarmkit.simulation.demand import SimulatedRequest, mean_of, quantile_of
from swarmkit.simulation.distances import Distances
from swarmkit.simulation.hardware import SimulatedModel
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.petals_client import PetalsRouter
from swarmkit.simulation.rules import PlannedRule
from swarmkit.simulation.swarm import SimulatedSwarm, SwarmHistory
from swarmkit.simulation.virtual_time import VirtualClock, run_virtually

Row = dict[str, Any]
"""A result, or a part of one, as JSON values."""


def answered(
    model: SimulatedModel,
    distances: Distances,
    machines: Sequence[Machine],
    spans: Mapping[str, tuple[int, int]],
    assumptions: SwarmAssumptions,
    requests: Sequence[SimulatedRequest],
    *,
    petals_clients: bool = False,
    clients: int = 1,
    pass_s: Callable[[Machine, int, float], float] | None = None,
    seed: int = 0,
) -> SwarmHistory:
    """Let a swarm with a given placement answer requests; clients are at the first places, servers behind."""

    async def main(clock: VirtualClock) -> SwarmHistory:
        async with anyio.create_task_group() as tasks:
            swarm = SimulatedSwarm(
                model, distances, PlannedRule(spans), assumptions, clock, tasks, seed=seed, pass_s=pass_s
            )
            for number, machine in enumerate(machines):
                if machine.name in spans:
                    swarm.join(machine, clients + number)
            await anyio.sleep(1000.0)
            users = []
            for place in range(clients):
                router = None
                if petals_clients:
                    router = PetalsRouter(place, swarm.look_up, swarm.servers.get, distances, clock)
                users.append(swarm.client(place, router))
            await swarm.answer_all(requests, users)
            tasks.cancel_scope.cancel()
        return swarm.finish()

    return run_virtually(main)


def times(history: SwarmHistory) -> Row:
    """The answers of a simulation, in seconds."""
    good = [one for one in history.answers if not one.lost]
    total, waited = [one.total_s for one in good], [one.waited_s for one in good]
    return {
        "answers": len(good),
        "lost": len(history.answers) - len(good),
        "answer_s": round(mean_of(total), 3),
        "answer_p95_s": round(quantile_of(total, 0.95), 3),
        "waited_s": round(mean_of(waited), 3),
        "waited_p95_s": round(quantile_of(waited, 0.95), 3),
        "waiting_to_answer": round(sum(waited) / max(sum(total), 1e-9), 4),
    }
