"""BLOOM-176B over 2 A100 and 7 slices of A100s, as arXiv 2512.21884 has it: a row of `placement.py`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from placement_runs import Row, answered

from swarmkit.placement import petals
from swarmkit.placement.description import Demand, Machine, ModelSize, Served
from swarmkit.placement.whole import plan_placement
from swarmkit.simulation.demand import mean_of, poisson_requests
from swarmkit.simulation.distances import Distances, clusters, read_topology
from swarmkit.simulation.hardware import SimulatedModel
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.swarm import SwarmHistory

BLOOM_BLOCK = 2_466_437_120 * 4.25 / 8 * 1.01
BLOOM_TOKEN = 2 * 14_336 * 2
BLOOM = SimulatedModel(
    name="bloom-176b",
    size=ModelSize(num_blocks=70, block_bytes=BLOOM_BLOCK, token_bytes=BLOOM_TOKEN),
    block_gflop=5.0,
    hidden_bytes=28_672,
)
PETALS_ALLOCATION_S, THEIR_ALLOCATION_S = 250.0, 60.0
"""The authors' simulator adds these to each request, as they measured them with Petals (arXiv 2512.21884)."""
REPORTED = {
    ("cluster 0", 0.1, 64): (6.23, 1.92),
    ("cluster 0", 0.1, 128): (4.76, 1.43),
    ("cluster 0", 0.5, 64): (6.28, 2.00),
    ("cluster 0", 0.5, 128): (5.14, 1.34),
    ("cluster 1", 0.1, 64): (5.44, 1.78),
    ("cluster 1", 0.1, 128): (4.60, 1.04),
    ("cluster 1", 0.5, 64): (5.56, 1.88),
    ("cluster 1", 0.5, 128): (4.79, 1.11),
    ("AboveNet", 0.1, 64): (4.98, 1.86),
    ("AboveNet", 0.1, 128): (4.03, 1.44),
    ("AboveNet", 0.5, 64): (5.26, 1.97),
    ("AboveNet", 0.5, 128): (4.58, 1.35),
    ("BellCanada", 0.1, 64): (6.31, 1.33),
    ("BellCanada", 0.1, 128): (3.82, 1.26),
    ("BellCanada", 0.5, 64): (6.74, 1.49),
    ("BellCanada", 0.5, 128): (4.16, 1.11),
}


def bloom(data: Path, runs: int = 5) -> Row:
    """The table of seconds per token of BLOOM-176B over 2 A100 and 7 slices."""
    rows = []
    for (where, rate, answer), (their_petals, theirs) in REPORTED.items():
        found = [_bloom_run(data, where, rate, answer, run) for run in range(runs)]
        ours, paper = (statistics.mean(column) for column in zip(*found, strict=True))
        rows.append(
            {
                "where": where,
                "rate": rate,
                "answer_tokens": answer,
                "ours_s": round(ours, 3),
                "ours_without_allocation_s": round(ours - THEIR_ALLOCATION_S / answer, 3),
                "theirs_reported_s": theirs,
                "ours_to_theirs": round(ours / theirs, 3),
                "petals_s": round(paper, 3),
                "petals_reported_s": their_petals,
                "petals_error": round(paper / their_petals - 1, 3),
            }
        )
    return {
        "requests": 100,
        "runs": runs,
        "allocation_s": {"petals": PETALS_ALLOCATION_S, "others": THEIR_ALLOCATION_S},
        "worst_ours_to_theirs": max(row["ours_to_theirs"] for row in rows),
        "worst_petals_error": max((row["petals_error"] for row in rows), key=abs),
        "results": rows,
    }


def _bloom_run(data: Path, where: str, rate: float, answer: int, run: int) -> tuple[float, float]:
    """Seconds per token of ours, and of Petals."""
    chance = random.Random(f"bloom {where} {run}")
    is_cluster = where.startswith("cluster")
    prompt = 10 if is_cluster else 20
    if is_cluster:
        sizes = [1, 2, 7] if where.endswith("0") else [0, 3, 7]
        distances = clusters(sizes, inside_bps=np.inf, between_bps=np.inf)
        kinds = ["a100"] * 2 + ["slice"] * 7
    else:
        whole = read_topology(data / "topology" / f"{where}.graph")
        chosen = chance.sample(range(whole.places), 10)
        distances = Distances(whole.one_way_s[np.ix_(chosen, chosen)], np.full((10, 10), np.inf))
        kinds = chance.sample(["a100"] * 2 + ["slice"] * 7, 9)
    overhead = 0.05 if is_cluster else 0.1
    prompt_overhead = 0.055 if is_cluster else (0.7049 * prompt + 67) * 1e-3
    machines = []
    for number, kind in enumerate(kinds):
        a100 = kind == "a100"
        if is_cluster:
            decode = 2.2197e-3 if a100 else 16.2488e-3
            prefill = decode + (5e-3 if a100 else 35e-3)
            memory = 79.138e9 if a100 else 9.1e9
        else:
            decode = 3.2197e-3 if a100 else 16.2488e-3
            prefill = (0.0743 * prompt + 32.99 if a100 else 0.1041 * prompt + 206.3547) * 1e-3
            memory = 79.13e9 if a100 else 8.2e9
        machines.append(
            Machine(
                name=f"{kind}-{number}",
                memory_bytes=memory,
                decode_s=decode,
                token_s=prefill / prompt,
                way_s=2 * distances.seconds(0, number + 1) + overhead,
            )
        )
    requests = poisson_requests(rate, 100, chance, prompt_tokens=prompt, answer_tokens=answer)
    length = prompt + answer
    common = SwarmAssumptions(
        relayed=True,
        overhead_s=overhead,
        prompt_overhead_s=prompt_overhead,
        reserved_tokens=length,
        load_bytes_per_s=1e12,
        look_period_s=1e9,
    )
    start_s = 0.1 if is_cluster else 0.07
    demand = Demand(
        arrivals_per_s=rate,
        prompt_tokens=prompt,
        answer_tokens=answer,
        most_tokens=length,
        session_s=THEIR_ALLOCATION_S,
    )
    plan = plan_placement(machines, BLOOM.size, demand)
    spans = {one.machine.name: (one.start, one.stop) for one in plan.placed if one is not None}
    ours = answered(
        BLOOM, distances, machines, spans, replace(common, session_s=start_s + THEIR_ALLOCATION_S), requests
    )
    paper = answered(
        BLOOM,
        distances,
        machines,
        petals_spans(machines, chance),
        # Petals' caches have no pages, whose last one is not full
        replace(
            common,
            session_s=start_s + PETALS_ALLOCATION_S,
            cache_tokens=4096 * (-(-length // 32) * 32) / length,
        ),
        requests,
        petals_clients=True,
    )
    return _per_token(ours), _per_token(paper)


def _per_token(history: SwarmHistory) -> float:
    return mean_of([one.total_s / one.request.answer_tokens for one in history.answers])


def petals_spans(machines: Sequence[Machine], chance: random.Random) -> dict[str, tuple[int, int]]:
    """Where Petals' servers go that join in a random order, with the speeds that its servers measured."""
    placed: list[Served] = []
    spans = {}
    for machine in chance.sample(list(machines), len(machines)):
        a100 = machine.name.startswith("a100")
        free = machine.memory_bytes - 2 * 2**30
        count = int(free / (BLOOM_BLOCK + 4096 * BLOOM_TOKEN))
        count = count if a100 else min(count, 4)
        forward, network = (20829.0, 3020.0) if a100 else (2757.7, 3138.0)
        start, stop = petals.choose_blocks(70, count, placed)
        placed.append(Served(start, stop, min(forward / ((count + 1) / 2), network), machine.name))
        spans[machine.name] = (start, stop)
    return spans
