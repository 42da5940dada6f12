"""How long does a new client take to its first token beside fifty strangers?

    python -m benchmarks.strangers
    python -m benchmarks.strangers --manner silent --clients 20 --json

Two servers of tiny-chat run in this process, over p2p daemons on loopback, and a peer announces fifty more
servers, which claim 10^12 tokens/s and have the manner that is asked for (`tests/strangers.py`). New clients
come one after the other, each with a daemon of its own, and generate one token twice. As many do so before
the strangers come.

Reported, as medians over clients:

    usual_s, usual_second_s     seconds to the token of a client's first and second session, without strangers
    first_s, second_s           the same, beside strangers
    first_bound_s               3 x usual_s + 3
    second_ratio                second_s / usual_second_s
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch

from swarmkit import LocalSwarm
from swarmkit.bench.environment import environment
from swarmkit.local.member import Place
from tests.strangers import STRANGE, Manner, Stranger

_STRANGERS = 50
_PROMPT = torch.tensor([[5, 6, 7, 8]])
MANNERS = {name: manner for name, manner in STRANGE.items() if name not in ("lying", "replaying")}


def token_s(model: Any) -> float:
    """Seconds for one token in a new session."""
    began = time.perf_counter()
    model.generate(_PROMPT, attention_mask=torch.ones_like(_PROMPT), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - began


def two_sessions(swarm: LocalSwarm) -> tuple[float, float]:
    """Seconds to the token of the first and the second session of a new client."""
    with swarm.model() as model:
        return token_s(model), token_s(model)


def _strangers(swarm: LocalSwarm, manner: Manner, services: int) -> Callable[[Place], Stranger]:
    return lambda place: Stranger(place.transport, swarm.checkpoint, manner, services=services)


def measure(manners: Sequence[Manner], clients: int) -> dict[str, Any]:
    """The times of so many clients of either kind."""
    torch.set_num_threads(1)
    with LocalSwarm("tiny-chat", 1, 2) as swarm:
        two_sessions(swarm)  # the first one of all is not counted
        alone = [two_sessions(swarm) for _ in range(clients)]
        for manner in dict.fromkeys(manners):
            services = manners.count(manner)
            swarm.add(_strangers(swarm, manner, services))
        beside = [two_sessions(swarm) for _ in range(clients)]
    usual, second = (statistics.median(times) for times in zip(*alone, strict=True))
    first_s, second_s = (statistics.median(times) for times in zip(*beside, strict=True))
    return {
        "usual_s": usual,
        "usual_second_s": second,
        "first_s": first_s,
        "first_most_s": max(first for first, _ in beside),
        "second_s": second_s,
        "first_bound_s": 3 * usual + 3,
        "second_ratio": second_s / second,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manner", choices=["all at once", *MANNERS], default="all at once")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON, with the machine and the versions")
    given = parser.parse_args()
    kinds = list(MANNERS.values()) if given.manner == "all at once" else [MANNERS[given.manner]]
    found = measure(list(islice(cycle(kinds), _STRANGERS)), given.clients)
    if given.json:
        print(
            json.dumps({"manner": given.manner, "clients": given.clients, **found, **environment()}, indent=2)
        )
    else:
        print("\n".join(f"{name:16} {value:8.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
