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
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from placement_bloom import bloom
from placement_document import RESULTS, document, plots
from placement_llama import SMALL_LLAMA, azure, helix, slices
from placement_optimum import small
from placement_runs import Row, answered, times

from swarmkit.bench.environment import environment
from swarmkit.placement.chains import compose_chains, sessions_per_s
from swarmkit.placement.choice import choose, should_move
from swarmkit.placement.description import Demand, Machine, ModelSize, Served, blocks_that_fit, served_by
from swarmkit.placement.together import SMALL_SWARM, PlacementMover
from swarmkit.placement.whole import plan_placement
from swarmkit.simulation.demand import mean_of, poisson_requests
from swarmkit.simulation.distances import read_topology
from swarmkit.simulation.hardware import HARDWARE, MODELS, machine_of
from swarmkit.simulation.options import SwarmAssumptions
from swarmkit.simulation.run import SimulationSetup, simulate, summary

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
    mixed = "20 mixed servers"
    for name, rate, clients in (("3 x 40 GB + 6 x 20 GB", 2.57, 1), (mixed, 0.2, 1), (mixed, 0.2, 8)):
        chance = random.Random(f"waiting {name}")
        if name.startswith("3"):
            model, machines = SMALL_LLAMA, slices()
            prompt, answer = 2048, 28
        else:
            model = MODELS["bloom-176b"]
            kinds = ["3g.40gb"] * 4 + ["2g.20gb"] * 16
            machines = [machine_of(HARDWARE[kind], model, f"{kind}-{n}") for n, kind in enumerate(kinds)]
            prompt, answer = 2000, 20
        places = len(machines) + clients
        distances = read_topology(data / "topology" / "ripe-atlas-eu-rtt.csv", places, chance)
        for n, one in enumerate(machines):
            ways = [distances.seconds(client, clients + n) for client in range(clients)]
            machines[n] = replace(one, way_s=2 * mean_of(ways) + 0.018)
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
            clients=clients,
        )
        capacity_per_s = round(capacity, 3)
        rows.append(
            {
                "swarm": name,
                "clients": clients,
                "capacity_per_s": capacity_per_s,
                "load": 0.7,
                **times(history),
            }
        )
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
