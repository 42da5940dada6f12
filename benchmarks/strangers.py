"""How long does a new client take to its first token beside fifty strangers?

    python -m benchmarks.strangers                            # strangers of all manners at once
    python -m benchmarks.strangers --manner silent --clients 5
    python -m benchmarks.strangers --manner each --json > benchmarks/results/strangers-tiny-chat.json

Two servers of tiny-chat run in processes of their own, over p2p daemons on loopback, and another process
announces fifty more servers, which claim 10^12 tokens/s and have the manner that is asked for
(`tests/strangers.py`). New clients come one after the other, each with a daemon of its own, and generate one
token twice. As many do so before the strangers come. "each" takes one manner after the other.

Reported, as medians over clients:

    usual_s, usual_second_s     seconds to the token of a client's first and second session, without strangers
    first_s, second_s           the same, beside strangers
    first_most_s                the longest of the first ones
    first_bound_s               3 x usual_s + 3
    second_ratio                second_s / usual_second_s
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import torch

from benchmarks.stranger_process import MODEL, strangers
from swarmkit import LocalSwarm
from swarmkit.bench.environment import environment
from tests.strangers import STRANGE

_STRANGERS = 50
_PROMPT = torch.tensor([[5, 6, 7, 8]])
MANNERS = [name for name in STRANGE if name not in ("lying", "replaying")]
ALL, EACH = "all at once", "each"


def token_s(model: Any) -> float:
    """Seconds for one token in a new session."""
    began = time.perf_counter()
    model.generate(_PROMPT, attention_mask=torch.ones_like(_PROMPT), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - began


def two_sessions(swarm: LocalSwarm) -> tuple[float, float]:
    """Seconds to the token of the first and the second session of a new client."""
    with swarm.model() as model:
        return token_s(model), token_s(model)


def measure(crowds: Mapping[str, Mapping[str, int]], clients: int) -> list[dict[str, Any]]:
    """The times of so many clients of either kind.

    Args: crowds: for each row, how many strangers there are of each manner.
    """
    torch.set_num_threads(1)
    rows = []
    with LocalSwarm(MODEL, 1, 2, processes=True) as swarm:
        two_sessions(swarm)  # the first one of all is not counted
        alone = [two_sessions(swarm) for _ in range(clients)]
        for name, crowd in crowds.items():
            with strangers(swarm.initial_peers, crowd):
                beside = [two_sessions(swarm) for _ in range(clients)]
            rows.append(row(name, alone, beside))
            print(rows[-1], file=sys.stderr)
    return rows


def row(name: str, alone: list[tuple[float, float]], beside: list[tuple[float, float]]) -> dict[str, Any]:
    """What is reported of one crowd of strangers."""
    usual, usual_second = (statistics.median(times) for times in zip(*alone, strict=True))
    first, second = (statistics.median(times) for times in zip(*beside, strict=True))
    found = {
        "usual_s": usual,
        "first_s": first,
        "first_most_s": max(first for first, _ in beside),
        "first_bound_s": 3 * usual + 3,
        "usual_second_s": usual_second,
        "second_s": second,
        "second_ratio": second / usual_second,
    }
    return {"strangers": name, "clients": len(beside)} | {
        key: round(value, 3) for key, value in found.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manner", choices=[ALL, EACH, *MANNERS], default=ALL)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON, with the machine and the versions")
    given = parser.parse_args()
    crowds: dict[str, Mapping[str, int]] = {name: {name: _STRANGERS} for name in MANNERS}
    crowds[ALL] = Counter(islice(cycle(MANNERS), _STRANGERS))
    wanted = crowds if given.manner == EACH else {given.manner: crowds[given.manner]}
    rows = measure(wanted, given.clients)
    if given.json:
        command = "python -m benchmarks.strangers " + " ".join(sys.argv[1:])
        print(
            json.dumps(
                {**environment(), "command": command, "benchmark": "strangers", "rows": rows}, indent=2
            )
        )


if __name__ == "__main__":
    main()
