"""Placement, routing and admission in virtual time, beside what others report (docs/placement.md).

    python benchmarks/placement.py --data FOLDER           all rows
    python benchmarks/placement.py thousand --data FOLDER  one of them
    python benchmarks/placement.py --document              only plots, and the table of docs/placement.md,
                                                           from the results that are there

Each row writes benchmarks/results/placement-NAME.json. All but `decisions` are simulations: what they find
does not depend on the machine or on what else runs on it. FOLDER has the traces that some rows need:
`demand/`, `churn/` and `topology/`, which are not part of the project.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from scipy.optimize import LinearConstraint, milp

from swarmkit.bench.environment import environment
from swarmkit.placement import petals
from swarmkit.placement.chains import compose_chains, sessions_per_s
from swarmkit.placement.choice import choose, should_move
from swarmkit.placement.description import (
    Demand,
    Machine,
    ModelSize,
    Served,
    blocks_that_fit,
    served_by,
)
from swarmkit.placement.supply import greatest_rate, greatest_rate_of_any
from swarmkit.placement.together import SMALL_SWARM, PlacementMover
from swarmkit.placement.whole import plan_placement
from swarmkit.simulation.demand import (
    SimulatedRequest,
    mean_of,
    poisson_requests,
    quantile_of,
    read_requests,
)
from swarmkit.simulation.distances import Distances, clusters, read_topology
from swarmkit.simulation.hardware import HARDWARE, MODELS, SimulatedModel, machine_of
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.petals_client import PetalsRouter
from swarmkit.simulation.plots import cumulative, draw_curves
from swarmkit.simulation.rules import PlannedRule
from swarmkit.simulation.run import SimulationSetup, simulate, summary
from swarmkit.simulation.swarm import SimulatedSwarm, SwarmHistory
from swarmkit.simulation.virtual_time import VirtualClock, run_virtually

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "placement.md"
BEGIN, END = "<!-- results: python benchmarks/placement.py --document -->\n", "<!-- end of results -->\n"

Row = dict[str, Any]


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


# ---------------------------------------------------------------------- 1,000 servers


def thousand(data: Path) -> Row:
    """1,000 mixed servers: what the placement carries ÷ what no placement can exceed."""
    quiet = SwarmAssumptions(
        announce_period_s=120.0, record_lifetime_s=300.0, look_period_s=1200.0, notice_s=30.0
    )
    rows = []
    for rule in ("ours", "petals"):
        for churn in (0.0, 0.1):
            setup = SimulationSetup(
                servers=1000,
                requests=0,
                hours=1.0,
                churn_per_hour=churn,
                rule=rule,  # type: ignore[arg-type]
                # Petals' rule lets all others follow in thought, which takes seconds among so many.
                assumptions=quiet if rule == "ours" else replace(quiet, look_period_s=1e9),
                seed=1,
            )
            history = simulate(setup)
            found = summary(setup, history)
            rows.append(
                {
                    "rule": rule,
                    "churn_per_hour": churn,
                    "moves_counted": rule == "ours",
                    **{key: found[key] for key in ("rate_to_bound", "rate_to_bound_least", "moves", "gaps")},
                    "curve": [
                        (round(one.at_s / 3600, 4), round(one.rate / one.bound, 4)) for one in history.samples
                    ],
                }
            )
    return {"servers": 1000, "model": "llama-2-70b", "results": rows}


# ---------------------------------------------------------------------- small instances, exactly


def best_rate(
    num_blocks: int, counts: Sequence[int], work: Sequence[float], found: float, limit_s: float = 30.0
) -> tuple[float, bool]:
    """The greatest rate of any placement, by a mixed integer program: one start for each server.

    Servers hold all blocks that fit: more blocks never carry less. Returns an upper bound of the rate, and
    whether it is the rate itself, to within 0.1 %.

    Args: found: a rate that is known to be possible. If it is the bound by maximum flow, it is the best.
    """
    bound = greatest_rate_of_any(num_blocks, list(zip(counts, work, strict=True)))
    if found >= bound * (1 - 1e-9):
        return bound, True
    starts = [(i, start) for i, count in enumerate(counts) for start in range(num_blocks - count + 1)]
    first_flow = len(starts)
    flows = [(i, block) for i in range(len(counts)) for block in range(num_blocks)]
    rate = first_flow + len(flows)
    matrix, low, high = [], [], []

    def add(terms: Mapping[int, float], least: float, most: float) -> None:
        line = np.zeros(rate + 1)
        for column, factor in terms.items():
            line[column] = factor
        matrix.append(line)
        low.append(least)
        high.append(most)

    for i, count in enumerate(counts):
        own = [column for column, (j, _) in enumerate(starts) if j == i]
        add(dict.fromkeys(own, 1.0), 1.0, 1.0)
        add({first_flow + i * num_blocks + block: 1.0 for block in range(num_blocks)}, 0.0, work[i])
        for block in range(num_blocks):
            covering = [column for column in own if starts[column][1] <= block < starts[column][1] + count]
            terms = dict.fromkeys(covering, -work[i])
            add({first_flow + i * num_blocks + block: 1.0, **terms}, -np.inf, 0.0)
    for block in range(num_blocks):
        add(
            {**{first_flow + i * num_blocks + block: 1.0 for i in range(len(counts))}, rate: -1.0},
            0.0,
            np.inf,
        )
    goal = np.zeros(rate + 1)
    goal[rate] = -1.0
    integral = np.concatenate([np.ones(len(starts)), np.zeros(len(flows) + 1)])
    most = np.concatenate([np.ones(len(starts)), np.full(len(flows) + 1, bound)])
    least = np.zeros(rate + 1)
    least[rate] = found * (1 - 1e-9)
    solved = milp(
        goal,
        constraints=LinearConstraint(np.array(matrix), low, high),
        integrality=integral,
        bounds=(least, most),
        options={"mip_rel_gap": 1e-3, "time_limit": limit_s},
    )
    if solved.mip_dual_bound is None:
        return bound, False
    return min(bound, float(-solved.mip_dual_bound)), solved.status == 0


def small_instance(chance: random.Random, equal_memory: bool) -> tuple[ModelSize, list[Machine]]:
    """Up to 10 servers of a model of up to 24 blocks that hold it together."""
    while True:
        num_blocks = chance.randint(6, 24)
        size = ModelSize(num_blocks=num_blocks, block_bytes=1.0, token_bytes=0.0)
        same = chance.randint(1, num_blocks)
        machines = [
            Machine(
                name=str(number),
                memory_bytes=float(same if equal_memory else chance.randint(1, num_blocks)),
                decode_s=(each := 1 / chance.choice((1.0, 2.0, 4.0, 8.0)) * chance.uniform(0.8, 1.25)),
                token_s=each,
            )
            for number in range(chance.randint(2, 10))
        ]
        if sum(one.memory_bytes for one in machines) >= num_blocks:
            return size, machines


def small(data: Path, count: int = 200) -> Row:
    """Small instances against the exact optimum, placed at once, and one after the other with moves."""
    rows = []
    for number in range(count):
        chance = random.Random(f"small {number}")
        equal_memory = number % 4 == 0
        size, machines = small_instance(chance, equal_memory)
        counts = [blocks_that_fit(one, size) for one in machines]
        work = [1 / one.token_s for one in machines]
        plan = plan_placement(machines, size, seed=number)
        best, proven = best_rate(size.num_blocks, counts, work, plan.rate)
        alone = one_by_one(machines, size, chance)
        paper = petals_one_by_one(machines, size)
        rows.append(
            {
                "servers": len(machines),
                "blocks": size.num_blocks,
                "equal_memory": equal_memory,
                "proven": proven,
                "gap": gap(plan.rate, best),
                "gap_one_by_one": gap(alone, best),
                "gap_petals": gap(paper, best),
            }
        )
    equal = [row for row in rows if row["equal_memory"]]

    def spread(name: str, chosen: Sequence[Row]) -> Row:
        gaps = [row[name] for row in chosen]
        return {"mean": round(statistics.mean(gaps), 5), "worst": round(max(gaps), 5)}

    return {
        "instances": count,
        "goal": "tokens per second (maximum flow)",
        "not_proven": sum(not row["proven"] for row in rows),
        "planned": spread("gap", rows),
        "planned_equal_memories": spread("gap", equal),
        "one_by_one": spread("gap_one_by_one", rows),
        "petals": spread("gap_petals", rows),
        "results": rows,
    }


def gap(found: float, best: float) -> float:
    """By which share of the best a rate is below it."""
    return round(max(0.0, 1 - found / best), 6) if best else 0.0


def one_by_one(machines: Sequence[Machine], size: ModelSize, chance: random.Random) -> float:
    """Servers that join in turn and move by our rule, until nobody wants to."""
    demand = Demand()
    movers = [PlacementMover() for _ in machines]
    placed: list[Served] = []
    for machine in machines:
        start, stop = choose(machine, placed, size, demand, count=blocks_that_fit(machine, size))
        placed.append(served_by(machine, start, stop, size))
    for _ in range(12):
        moved = False
        for number in chance.sample(range(len(placed)), len(placed)):
            others = [one for other, one in enumerate(placed) if other != number]
            own = placed[number]
            move = movers[number].better_place(
                machines[number], own, others, size, demand, count=own.blocks, move_s=1.0
            )
            if move is not None:
                placed[number] = served_by(machines[number], move.start, move.stop, size)
                moved = True
        if not moved:
            break
    return greatest_rate(size.num_blocks, placed)


def petals_one_by_one(machines: Sequence[Machine], size: ModelSize) -> float:
    """Servers that join in turn by Petals' rule."""
    placed: list[Served] = []
    for machine in machines:
        start, stop = petals.choose_blocks(size.num_blocks, blocks_that_fit(machine, size), placed)
        placed.append(served_by(machine, start, stop, size))
    return greatest_rate(size.num_blocks, placed)


# ---------------------------------------------------------------------- BLOOM-176B, seconds per token

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


# ---------------------------------------------------------------------- Llama-2-7B, Azure's requests

SMALL_LLAMA = SimulatedModel(
    name="llama-2-7b",
    size=ModelSize(num_blocks=32, block_bytes=0.4375e9, token_bytes=0.0336e9 / 2076),
    block_gflop=5.0,  # the authors use BLOOM's figure here too, and 1.32 GB for a block's memory traffic
    hidden_bytes=8192,
)


def _slices(own_arithmetic: bool = False) -> list[Machine]:
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
                for number, one in enumerate(_slices(own_arithmetic))
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


# ---------------------------------------------------------------------- Llama-2-70B on 24 nodes (Helix)

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


# ---------------------------------------------------------------------- T4 spot instances


def t4(data: Path) -> Row:
    """Llama-2-7B on T4 spot instances that come and go as recorded, with Azure's requests."""
    rows = []
    for name, notice_s in (("told 30 s before", 30.0), ("crash", None)):
        setup = SimulationSetup(
            model="llama-2-7b",
            mix={"t4": 1.0},
            trace=data / "churn" / "t4-us-east-1c.csv",
            demand=data / "demand" / "azure-code.csv",
            topology=data / "topology" / "ripe-atlas-eu-rtt.csv",
            requests=8819,
            stretch=8.0,  # of its 2.6 requests a second, more than two such machines can compute
            hours=8.0,
            clients=4,
            assumptions=SwarmAssumptions(
                batching=True,
                paged=True,
                notice_s=notice_s,
                announce_period_s=10.0,
                look_period_s=3.0,
                load_bytes_per_s=1e9,
            ),
            seed=1,
        )
        history = simulate(setup)
        found = summary(setup, history)
        rows.append({"departures": name, **found, "gap_list_s": [round(b - a, 1) for a, b in history.gaps]})
    return {"announce_period_s": 10.0, "trace": "t4-us-east-1c", "results": rows}


# ---------------------------------------------------------------------- waiting at 0.7 of capacity


def waiting(data: Path) -> Row:
    """Waiting ÷ answer time where requests come at 0.7 of what the placement's caches carry."""
    rows = []
    for name, rate in (("3 x 40 GB + 6 x 20 GB", 2.57), ("20 mixed servers", 0.2)):
        chance = random.Random(f"waiting {name}")
        if name.startswith("3"):
            model, machines = SMALL_LLAMA, _slices()
            prompt, answer = 2048, 28
        else:
            model = MODELS["bloom-176b"]
            kinds = ["3g.40gb"] * 4 + ["2g.20gb"] * 16
            machines = [machine_of(HARDWARE[kind], model, f"{kind}-{n}") for n, kind in enumerate(kinds)]
            prompt, answer = 2000, 20
        distances = read_topology(data / "topology" / "ripe-atlas-eu-rtt.csv", len(machines) + 1, chance)
        machines = [
            replace(one, way_s=2 * distances.seconds(0, n + 1) + 0.018) for n, one in enumerate(machines)
        ]
        demand = Demand(
            arrivals_per_s=rate, prompt_tokens=prompt, answer_tokens=answer, most_tokens=prompt + answer
        )
        for _ in range(3):  # the placement follows the demand, which is 0.7 of what the placement carries
            plan = plan_placement(machines, model.size, demand)
            placed = [one for one in plan.placed if one is not None]
            capacity = sessions_per_s(compose_chains(placed, model.size, demand))
            demand = replace(demand, arrivals_per_s=0.7 * capacity)
        spans = {one.machine.name: (one.start, one.stop) for one in placed}
        requests = poisson_requests(0.7 * capacity, 3000, chance, prompt_tokens=prompt, answer_tokens=answer)
        history = answered(
            model,
            distances,
            machines,
            spans,
            SwarmAssumptions(
                relayed=True,
                overhead_s=0.018,
                prompt_overhead_s=0.018,
                reserved_tokens=prompt + answer,
                load_bytes_per_s=1e12,
                look_period_s=1e9,
            ),
            requests,
        )
        rows.append({"swarm": name, "capacity_per_s": round(capacity, 3), "load": 0.7, **times(history)})
    return {"requests": 3000, "results": rows}


# ---------------------------------------------------------------------- cost of one decision


def decisions(data: Path) -> Row:
    """Seconds of one decision among 149, 1,000 and 10,000 servers. To be run on a quiet machine."""
    model = MODELS["llama-2-70b"]
    rows = []
    for count in (149, 1000, 10_000):
        chance = random.Random(f"decisions {count}")
        kinds = chance.choices(list(HARDWARE), k=count)
        machines = [
            machine_of(HARDWARE[kind], model, f"{n}", way_s=chance.uniform(0.01, 0.1))
            for n, kind in enumerate(kinds)
        ]
        placed = []
        for one in machines:
            blocks = max(1, blocks_that_fit(one, model.size, 256))
            start = chance.randint(0, 80 - blocks)
            placed.append(served_by(one, start, start + blocks, model.size))
        demand = Demand(arrivals_per_s=1.0)
        chosen, moved = [], []
        for _ in range(9):
            number = chance.randrange(count)
            others = placed[:number] + placed[number + 1 :]
            began = time.perf_counter()
            choose(machines[number], others, model.size, demand)
            chosen.append(time.perf_counter() - began)
            began = time.perf_counter()
            should_move(machines[number], placed[number], others, model.size, demand)
            moved.append(time.perf_counter() - began)
        rows.append(
            {
                "servers": count,
                "choose_s": round(statistics.median(chosen), 5),
                "should_move_s": round(statistics.median(moved), 5),
            }
        )
    return {"results": rows, "together": together(model.size.num_blocks)}


def together(num_blocks: int) -> Row:
    """Seconds of a decision in the largest swarm in which moves of several servers are thought of."""
    chance = random.Random("together")
    size = ModelSize(num_blocks=num_blocks, block_bytes=1.0, token_bytes=0.0)
    placed: list[Served] = []
    machines = []
    for _ in range(SMALL_SWARM):
        count = chance.choice((4, 8, 12, 20, 24))
        each = 1.0 / (chance.uniform(10, 60) * count)
        machines.append(Machine(memory_bytes=count, decode_s=each, token_s=each))
        start, stop = choose(machines[-1], placed, size, count=count)
        placed.append(served_by(machines[-1], start, stop, size))
    seconds = []
    for number in range(9):
        own, others = placed[number], placed[:number] + placed[number + 1 :]
        began = time.perf_counter()
        PlacementMover().better_place(machines[number], own, others, size, count=own.blocks)
        seconds.append(time.perf_counter() - began)
    median = round(statistics.median(seconds), 5)
    return {"servers": SMALL_SWARM, "blocks": num_blocks, "better_place_s": median}


ROWS: Mapping[str, Callable[[Path], Row]] = {
    "thousand": thousand,
    "small": small,
    "bloom": bloom,
    "azure": azure,
    "helix": helix,
    "t4": t4,
    "waiting": waiting,
    "decisions": decisions,
}


def plots() -> None:
    """Draw the results that have curves."""
    for name, title, x_label, key in (
        ("thousand", "1,000 servers: tokens per second ÷ upper bound", "hours", ("rule", "churn_per_hour")),
        ("azure", "Share of answers that took no longer", "seconds", ("case",)),
    ):
        path = RESULTS / f"placement-{name}.json"
        if path.exists():
            rows = json.loads(path.read_text())["results"]
            curves = {" ".join(str(row[one]) for one in key): row["curve"] for row in rows}
            (RESULTS / f"placement-{name}.svg").write_text(draw_curves(title, x_label, "", curves))


def lines(found: Mapping[str, Row]) -> list[str]:
    """The table of docs/placement.md, as far as there are results: scenario, target, found."""
    rows: list[tuple[str, str, str]] = []
    if one := found.get("thousand"):
        for rule, name in (("ours", "our rule"), ("petals", "Petals' rule, without moves")):
            still, churn = (
                next(r for r in one["results"] if r["rule"] == rule and bool(r["churn_per_hour"]) is moving)
                for moving in (False, True)
            )
            target = "≥ 0.95; ≥ 0.90" if rule == "ours" else "beside it"
            text = f"{still['rate_to_bound']:.3f}; {churn['rate_to_bound']:.3f}"
            rows.append(
                (f"1,000 mixed servers, {name}: rate ÷ bound, still; 10 % churn an hour", target, text)
            )
    if one := found.get("small"):
        for key, name, target in (
            ("planned", "planned at once", "mean ≤ 5 %, worst ≤ 10 %"),
            ("planned_equal_memories", "planned at once, equal memories", "0"),
            ("one_by_one", "our rule, one by one with moves", "beside it"),
            ("petals", "Petals' rule, one by one", "beside it"),
        ):
            text = f"mean {one[key]['mean']:.2%}, worst {one[key]['worst']:.2%}"
            rows.append((f"{one['instances']} small instances, {name}: gap to the optimum", target, text))
        if one["not_proven"]:
            text = "compared with a bound that may be above the optimum"
            rows.append((f"… of which without a proven optimum: {one['not_proven']}", "", text))
    if one := found.get("bloom"):
        text = f"worst {one['worst_ours_to_theirs']:.2f} ×"
        rows.append(("BLOOM-176B, 16 cells: ours ÷ theirs", "≤ 1.10 in each", text))
        near = sum(abs(row["petals_error"]) <= 0.35 for row in one["results"])
        text = f"{near} of {len(one['results'])} cells; worst {one['worst_petals_error']:+.0%}"
        rows.append(("BLOOM-176B: Petals in this simulator against reported", "within 35 % in each", text))
    if one := found.get("azure"):
        for row in one["results"]:
            text = f"{row['answer_s']:.1f} s, {row['answer_p95_s']:.1f} s, {row['waited_s']:.2f} s"
            text += f", {row['lost']:g} lost" if row["lost"] else ""
            target = "≤ 7.3, ≤ 15.2, ≤ 0.6 s" if row["case"] == "as reported" else "beside it"
            rows.append((f"Llama-2-7B, Azure, {row['case']}: mean, 95th, waiting", target, text))
    if one := found.get("helix"):
        for network in ("one cluster", "three regions"):
            rates = {
                row["placement"]: row["decode_tokens_per_s"]
                for row in one["results"]
                if row["network"] == network
            }
            text = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            rows.append((f"Llama-2-70B, 24 nodes, {network}: tokens/s", "better than both", text))
        rows.append(("… placed in", "< 1 s", "not comparable on a busy machine; see its file"))
    if one := found.get("t4"):
        for row in one["results"]:
            asked = row["answers"] + row["lost"] + row["turned_away"]
            text = f"{row['lost_while_covered']} lost and {row['turned_away']} turned away of {asked}; "
            text += f"longest gap {row['longest_gap_s']:.0f} s"
            rows.append((f"T4 trace, {row['departures']}", "none lost while covered; ≤ 20 s", text))
    if one := found.get("waiting"):
        for row in one["results"]:
            text = f"{row['waiting_to_answer']:.1%}" + (f", {row['lost']} lost" if row["lost"] else "")
            rows.append((f"Waiting ÷ answer at 0.7 of capacity, {row['swarm']}", "≤ 15 %", text))
    if one := found.get("decisions"):
        for row, target in zip(one["results"], ("35 ms", "1 s", "near n log n"), strict=True):
            text = f"{row['choose_s'] * 1e3:.0f} ms; {row['should_move_s'] * 1e3:.0f} ms"
            rows.append((f"One decision among {row['servers']:,} servers: choose; move", target, text))
        if several := one.get("together"):
            text = f"{several['better_place_s'] * 1e3:.0f} ms"
            rows.append((f"… among {several['servers']}, with moves that help together", "35 ms", text))
    return [
        "| scenario | target | found |",
        "| --- | --- | --- |",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]


def bloom_lines(found: Row) -> list[str]:
    """The cells of BLOOM-176B: reported and simulated, in seconds per token."""
    heads = "requests/s", "tokens", "Petals", "simulated", "theirs", "ours", "ours without allocation"
    table = ["| where | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
    for row in found["results"]:
        cells = [row["where"], row["rate"], row["answer_tokens"], row["petals_reported_s"], row["petals_s"]]
        cells += [row["theirs_reported_s"], row["ours_s"], row["ours_without_allocation_s"]]
        table.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return table


def document() -> None:
    """Write the results that are there into docs/placement.md, between its two marks."""
    found = {path.stem.removeprefix("placement-"): json.loads(path.read_text()) for path in _files()}
    parts = ["", *lines(found), ""]
    if "bloom" in found:
        parts += ["Seconds per token of BLOOM-176B, cell by cell:", "", *bloom_lines(found["bloom"]), ""]
    for name, text in (
        ("thousand", "Tokens per second ÷ upper bound of 1,000 servers, over an hour"),
        ("azure", "Share of Azure's requests that were answered within some seconds"),
    ):
        if (RESULTS / f"placement-{name}.svg").exists():
            parts += [f"![{text}](../benchmarks/results/placement-{name}.svg)", ""]
    page = DOCUMENT.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + "\n".join(parts) + END + after)


def _files() -> list[Path]:
    return sorted(RESULTS.glob("placement-*.json"))


def main() -> None:
    """Run rows and write what they find."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the traces")
    parser.add_argument("--document", action="store_true", help="only plots and docs/placement.md")
    arguments = parser.parse_args()
    for name in [] if arguments.document else arguments.names or list(ROWS):
        began = time.perf_counter()
        found = {
            "benchmark": f"placement {name}",
            **environment(),
            "command": f"python benchmarks/placement.py {name} --data FOLDER",
            **ROWS[name](arguments.data),
        }
        (RESULTS / f"placement-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    plots()
    document()


if __name__ == "__main__":
    main()
