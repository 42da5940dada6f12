"""Small swarms, whose best placement can be computed, beside ours: a row of `placement.py`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from placement_runs import Row
from scipy.optimize import LinearConstraint, milp

from swarmkit.placement import petals
from swarmkit.placement.choice import choose
from swarmkit.placement.description import Demand, Machine, ModelSize, Served, blocks_that_fit, served_by
from swarmkit.placement.supply import greatest_rate, greatest_rate_of_any
from swarmkit.placement.together import PlacementMover
from swarmkit.placement.whole import plan_placement


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
