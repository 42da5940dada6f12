"""Llama 2 as two papers place it (arXiv 2604.14993; Helix, ASPLOS 2025): two rows of `placement.py`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from placement_runs import Row, answered, times

from swarmkit.placement.description import Demand, Machine, ModelSize, Served
from swarmkit.placement.supply import greatest_rate, greatest_rate_of_any
from swarmkit.placement.whole import plan_placement
from swarmkit.simulation.demand import SimulatedRequest, read_requests
from swarmkit.simulation.distances import clusters, read_topology
from swarmkit.simulation.hardware import HARDWARE, MODELS, SimulatedModel, machine_of
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.plots import cumulative

# Llama-2-7B, Azure's requests

SMALL_LLAMA = SimulatedModel(
    name="llama-2-7b",
    size=ModelSize(num_blocks=32, block_bytes=0.4375e9, token_bytes=0.0336e9 / 2076),
    block_gflop=5.0,  # the authors use BLOOM's figure here too, and 1.32 GB for a block's memory traffic
    hidden_bytes=8192,
)


def slices(own_arithmetic: bool = False) -> list[Machine]:
    """3 large and 6 small slices of A100s.

    Args: own_arithmetic: blocks cost what those of Llama-2-7B cost, at half of the hardware's speed; else
        what the authors assume.
    """

    def one(kind: str, name: str) -> Machine:
        hardware = HARDWARE[kind]
        if own_arithmetic:
            return machine_of(hardware, MODELS["llama-2-7b"], name, speed=0.5)
        return Machine(
            name=name,
            memory_bytes=hardware.memory_gb * 1e9,
            decode_s=1.32 / hardware.gb_per_s,
            token_s=5 / (hardware.tflops * 1e3),
        )

    return [one("3g.40gb", f"large-{n}") for n in range(3)] + [one("2g.20gb", f"small-{n}") for n in range(6)]


def azure(data: Path, runs: int = 5) -> Row:
    """Llama-2-7B on 3 x 40 GB and 6 x 20 GB with the first 1,000 requests of Azure's trace."""
    requests = read_requests(data / "demand" / "azure-code.csv", 1000)
    rows = []
    for name, batching, own_arithmetic in (
        ("as reported", False, False),
        ("paging and batching", True, True),
        ("paging and batching, the authors' arithmetic", True, False),
    ):
        found = []
        for run in range(runs if own_arithmetic or not batching else 1):
            distances = read_topology(
                data / "topology" / "ripe-atlas-eu-rtt.csv", 10, random.Random(f"azure {run}")
            )
            machines = [
                replace(one, way_s=2 * distances.seconds(0, number + 1) + 0.018)
                for number, one in enumerate(slices(own_arithmetic))
            ]
            demand = Demand(arrivals_per_s=2.57, prompt_tokens=2048, answer_tokens=28, most_tokens=2076)
            assumptions = SwarmAssumptions(
                relayed=True,
                overhead_s=0.018,
                prompt_overhead_s=0.05,
                block_overhead_s=0.001,
                reserved_tokens=2076,
                load_bytes_per_s=1e12,
                look_period_s=1e9,
            )
            plan = plan_placement(machines, SMALL_LLAMA.size, demand)
            spans = {one.machine.name: (one.start, one.stop) for one in plan.placed if one is not None}
            if batching:
                assumptions = replace(assumptions, paged=True, batching=True, reserved_tokens=0)
            history = answered(SMALL_LLAMA, distances, machines, spans, assumptions, requests, seed=run)
            found.append((times(history), history))
        row = {key: round(statistics.mean(one[key] for one, _ in found), 3) for key in found[0][0]}
        curve = cumulative([one.total_s for one in found[0][1].answers if not one.lost])[::10]
        rows.append(
            {"case": name, "runs": len(found), **row, "curve": [(round(x, 2), round(y, 3)) for x, y in curve]}
        )
    return {
        "requests": 1000,
        "demand": "Azure LLM inference trace 2023, code, first 1,000 requests",
        "reported": {"petals": [31.4, 68.5, 24.2], "chains": [7.3, 15.2, 0.6]},
        "results": rows,
    }


# Llama-2-70B on 24 nodes (Helix)

HELIX_MODEL = SimulatedModel(
    name="llama-2-70b",
    size=ModelSize(num_blocks=80, block_bytes=1.675e9, token_bytes=4096.0),
    block_gflop=1.71,
    hidden_bytes=16_384,
)
HELIX_KINDS = {
    # most blocks; GB of memory; ms of a block by tokens in a pass (profiles of Helix, ASPLOS 2025)
    "A100": (12, 36.0, ((2, 1.4), (50, 1.7), (100, 2.3), (200, 3.0), (400, 5.5), (512, 7.2))),
    "L4": (7, 21.6, ((2, 6.9), (50, 8.4), (100, 9.4), (200, 14.0), (400, 22.5), (512, 26.5))),
    "T4": (4, 14.4, ((2, 7.1), (50, 9.9), (100, 11.7), (200, 20.0), (400, 37.0), (512, 41.0))),
}
REGIONS = (["A100"] * 4, ["L4"] * 2 + ["T4"] * 8, ["L4"] * 6 + ["T4"] * 4)
PUBLISHED_PETALS = {
    "A100": [(30, 42), (11, 23), (60, 72), (14, 26)],
    "L4": [(7, 14), (4, 11), (53, 60), (42, 49), (0, 7), (46, 53), (53, 60), (72, 79)],
    "T4": [
        *((34, 38), (76, 80), (72, 76), (26, 30), (30, 34), (60, 64)),
        *((38, 42), (26, 30), (76, 80), (42, 46), (0, 4), (49, 53)),
    ],
}
"""Petals' placement in one cluster of 24, as Helix's authors published it."""


def _helix_machines() -> list[Machine]:
    found = []
    for region, kinds in enumerate(REGIONS):
        for number, kind in enumerate(kinds):
            _, memory_gb, table = HELIX_KINDS[kind]
            found.append(
                Machine(
                    name=f"{kind}-{region}-{number}",
                    memory_bytes=memory_gb * 1e9,
                    decode_s=table[0][1] * 1e-3,
                    token_s=table[3][1] * 1e-3 / table[3][0],
                    way_s=0.001,
                )
            )
    return found


def helix_pass_s(machine: Machine, blocks: int, tokens: float) -> float:
    """Seconds of a pass, from the table of the kind."""
    table = HELIX_KINDS[machine.name.split("-")[0]][2]
    return blocks * float(np.interp(tokens, [x for x, _ in table], [y for _, y in table])) * 1e-3


def helix(data: Path) -> Row:
    """Llama-2-70B on 24 uneven nodes, in one cluster and in three regions: decode tokens per second."""
    machines = _helix_machines()
    most = {one.name: HELIX_KINDS[one.name.split("-")[0]][0] for one in machines}
    limited = [replace(one, memory_bytes=most[one.name]) for one in machines]
    began = time.perf_counter()
    plan = plan_placement(limited, ModelSize(num_blocks=80, block_bytes=1.0, token_bytes=0.0), effort=1500)
    plan_s = time.perf_counter() - began
    ours = {one.machine.name: (one.start, one.stop) for one in plan.placed if one is not None}
    paper: dict[str, tuple[int, int]] = {}
    left = {kind: list(spans) for kind, spans in PUBLISHED_PETALS.items()}
    for one in machines:
        paper[one.name] = left[one.name.split("-")[0]].pop(0)
    placements = {"ours": ours, "petals": paper, "swarm": _equal_stages(machines)}
    rows = []
    chance = random.Random("helix")
    requests = [
        SimulatedRequest(0.05 * number, prompt, max(2, answer))
        for number, (prompt, answer) in enumerate(
            (min(2048, max(4, round(chance.expovariate(1 / 763)))), round(chance.expovariate(1 / 232)))
            for _ in range(144)
        )
    ]
    for network, distances in (
        ("one cluster", clusters([48], inside_rtt_s=0.002, inside_bps=1e10)),
        (
            "three regions",
            clusters(
                [28, 10, 10],
                inside_rtt_s=0.002,
                between_rtt_s=0.1,
                inside_bps=1e10,
                between_bps=1e8,
            ),
        ),
    ):
        for name, spans in placements.items():
            served = [
                Served(start, stop, 1 / ((stop - start) * one.token_s), one.name)
                for one in machines
                for start, stop in [spans[one.name]]
            ]
            history = answered(
                HELIX_MODEL,
                distances,
                machines,
                spans,
                SwarmAssumptions(
                    batching=True,
                    paged=True,
                    overhead_s=0.001,
                    prompt_overhead_s=0.001,
                    load_bytes_per_s=1e12,
                    look_period_s=1e9,
                ),
                requests,
                clients=24,
                pass_s=helix_pass_s,
            )
            done = sorted(one.request.at_s + one.total_s for one in history.answers)
            tokens = sum(one.request.answer_tokens for one in history.answers)
            rows.append(
                {
                    "network": network,
                    "placement": name,
                    "greatest_rate": round(greatest_rate(80, served), 1),
                    "decode_tokens_per_s": round(tokens / done[-1], 1),
                    "lost": sum(one.lost for one in history.answers),
                }
            )
    return {
        "nodes": 24,
        "plan_s": round(plan_s, 3),
        "bound": round(greatest_rate_of_any(80, [(most[one.name], 1 / one.token_s) for one in machines]), 1),
        "reported_tokens_per_s": {
            "three regions": {"helix": 98.0, "petals": 66.6, "swarm": 41.6},
            "one cluster": {"helix": 252.1, "swarm": 124.7},
        },
        "results": rows,
    }


def _equal_stages(machines: Sequence[Machine]) -> dict[str, tuple[int, int]]:
    """SWARM's placement: 20 equal stages, the fastest server to the weakest stage."""
    strength = [0.0] * 20
    spans = {}
    for one in sorted(machines, key=lambda one: (one.token_s, one.name)):
        stage = strength.index(min(strength))
        strength[stage] += 1 / (4 * one.token_s)
        spans[one.name] = (4 * stage, 4 * stage + 4)
    return spans
