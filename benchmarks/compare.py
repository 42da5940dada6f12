"""Run one benchmark in two checkouts in turn, and compare their figures.

    python benchmarks/compare.py ../older-checkout --turns 3 -- decode --model S --stages 1,2,4

Each turn runs `swarmkit bench …` once in the older checkout and once in this one, with the same
interpreter. Speed drifts on every machine, so that only figures of neighbouring runs are compared: for
every number that both outputs contain in the same place, the ratio new ÷ old is computed per turn, and the
median of these ratios is printed. Figures that hold for the machine alone, such as the time of the local
model, show how much the machine itself drifted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def main() -> int:
    """Returns 0 when all runs succeeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("older", type=Path, help="another checkout of this repository")
    parser.add_argument("--turns", type=int, default=3, help="how often each of the two runs; 3 by default")
    parser.add_argument("--output", type=Path, help="a JSON file to write the figures to")
    parser.add_argument("command", nargs="+", help="what follows `swarmkit bench`, after --")
    options = parser.parse_args()
    older = options.older.resolve()

    machine: Any = None
    ratios: dict[str, list[float]] = {}
    figures: dict[str, tuple[list[float], list[float]]] = {}
    for turn in range(options.turns):
        # The order alternates, so that a machine that slows down steadily favours neither of the two.
        order = [older, HERE] if turn % 2 == 0 else [HERE, older]
        outputs = {checkout: run(checkout, options.command) for checkout in order}
        machine = outputs[HERE].pop("machine", None)
        found = {checkout: dict(numbers(output)) for checkout, output in outputs.items()}
        for name in found[older].keys() & found[HERE].keys():
            old, new = found[older][name], found[HERE][name]
            figures.setdefault(name, ([], []))[0].append(old)
            figures[name][1].append(new)
            if old:
                ratios.setdefault(name, []).append(new / old)
        print(f"turn {turn + 1} of {options.turns} is done", file=sys.stderr)

    rows = {
        name: {
            "old": statistics.median(figures[name][0]),
            "new": statistics.median(figures[name][1]),
            "new_to_old": round(statistics.median(values), 4),
            "turns": [round(value, 4) for value in values],
        }
        for name, values in sorted(ratios.items())
    }
    for name, row in rows.items():
        print(f"{name:60} {row['old']:>12.4g} {row['new']:>12.4g}  {row['new_to_old']:.3f}")
    if options.output:
        result = {
            "benchmark": "compare",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": f"swarmkit bench {' '.join(options.command)} --json",
            "older_commit": commit_of(older),
            "newer_commit": commit_of(HERE),
            "turns": options.turns,
            "machine": machine,
            "figures": rows,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def run(checkout: Path, command: list[str]) -> Any:
    """Run a benchmark of that checkout, and return what it printed as JSON.

    Raises:
        CalledProcessError: the benchmark failed.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    output = subprocess.run(
        [sys.executable, "-m", "swarmkit.cli", "bench", *command, "--json"],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return json.loads(output)


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number inside a JSON value, by the path to it. A list of numbers counts as its median."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        if value and all(isinstance(item, int | float) for item in value):
            yield name, float(statistics.median(value))
        else:
            for index, inner in enumerate(value):
                yield from numbers(inner, f"{name}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def commit_of(checkout: Path) -> str:
    """The commit that is checked out there, abbreviated."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
