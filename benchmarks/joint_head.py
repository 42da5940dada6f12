"""What does it bring that threads of one process compute their output layer in one product?

    python benchmarks/joint_head.py --json > benchmarks/results/joint-head.json     (about 4 minutes)

Random Llamas with the blocks of M (hidden size 1024, 16 blocks), with vocabularies of 32,000 and 128,000
tokens: their output layers have 131 and 524 MB in float32. Two servers, processes of their own with one torch
thread each, have the blocks. Clients decode greedily, each in a thread of this process with one torch thread,
over one of two models of this process. `joint` is the model as it is loaded; in `apart` its output layer is
torch's own again, so that each thread computes its rows alone. The two take turns, round by round, on the
same prompts; the first round does not count. All answers are compared: they are the same in both.

Reported for each vocabulary and number of clients, as medians over rounds: tokens per second of all clients
together, with their prompts; milliseconds of processor time that this process spends for a token, with all
that `generate()` does; and the ratios `joint` ÷ `apart` of both, medians of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from swarmkit.bench.environment import environment
from swarmkit.bench.measure import PATIENT, random_prompt, timed_generate
from swarmkit.bench.random_llama import make_random_llama
from swarmkit.cli.console import quiet_transformers
from swarmkit.local.swarm import LocalSwarm

PROMPT_TOKENS = 8


def answers(model: Any, prompts: Sequence[torch.Tensor], tokens: int) -> tuple[float, float, list[Any]]:
    """Seconds and processor seconds of this process until all are answered, and the answers."""

    def one(prompt: torch.Tensor) -> list[int]:
        torch.set_num_threads(1)
        found: list[int] = timed_generate(model, prompt, tokens, collects=False).tokens[0].tolist()
        return found

    gc.collect()
    began, spent_s = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(prompts)) as threads:
        found = list(threads.map(one, prompts))
    return time.perf_counter() - began, time.process_time() - spent_s, found


def measure(
    models: dict[str, Any], vocabulary: int, clients: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """The row of a vocabulary and a number of clients."""
    speeds: dict[str, list[float]] = {way: [] for way in models}
    spent_ms: dict[str, list[float]] = {way: [] for way in models}
    for number in range(rounds + 1):
        prompts = [random_prompt(vocabulary, PROMPT_TOKENS, 1000 * number + one) for one in range(clients)]
        found = {}
        for way, model in models.items():
            seconds, processor_s, found[way] = answers(model, prompts, tokens)
            if number:
                speeds[way].append(clients * tokens / seconds)
                spent_ms[way].append(processor_s * 1e3 / (clients * tokens))
        assert found["joint"] == found["apart"], "the tokens differ"
        print(f"{vocabulary}, {clients} clients: round {number} of {rounds}", file=sys.stderr)
    return {
        "vocabulary": vocabulary,
        "clients": clients,
        "tokens_per_s": {way: round(statistics.median(values), 2) for way, values in speeds.items()},
        "ratio": _ratio(speeds),
        "ratios": [round(a / b, 3) for a, b in zip(speeds["joint"], speeds["apart"], strict=True)],
        "client_ms": {way: round(statistics.median(values), 2) for way, values in spent_ms.items()},
        "client_ratio": _ratio(spent_ms),
    }


def _ratio(values: dict[str, list[float]]) -> float:
    return round(statistics.median(a / b for a, b in zip(values["joint"], values["apart"], strict=True)), 3)


def rows_of(vocabulary: int, clients: Sequence[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_random_llama(Path(folder), vocab_size=vocabulary)
        with LocalSwarm(checkpoint, 2, processes=True, dtype="float32", client_settings=PATIENT) as swarm:
            models = {way: swarm.model(dtype="float32") for way in ("apart", "joint")}
            models["apart"].get_output_embeddings().__class__ = nn.Linear
            return [measure(models, vocabulary, count, tokens, rounds) for count in clients]


def main() -> int:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--vocabularies", default="32000,128000", help="numbers of tokens, as in 32000,128000"
    )
    parser.add_argument("--clients", default="1,8,32", help="numbers of clients, as in 1,8")
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(1)
    clients = [int(count) for count in options.clients.split(",")]
    rows = []
    for vocabulary in map(int, options.vocabularies.split(",")):
        rows += rows_of(vocabulary, clients, options.tokens, options.rounds)
    result = {
        "benchmark": "joint_head",
        **environment(),
        "command": " ".join(["python benchmarks/joint_head.py", *sys.argv[1:]]),
        "rounds": options.rounds,
        "tokens": options.tokens,
        "threads": 1,
        "dtype": "float32",
        "rows": rows,
    }
    if options.json:
        print(json.dumps(result))
        return 0
    table = Table(
        "vocabulary", "clients", "tokens/s apart", "joint", "ratio", "client ms apart", "joint", "ratio"
    )
    for row in rows:
        figures = [
            *row["tokens_per_s"].values(),
            row["ratio"],
            *row["client_ms"].values(),
            row["client_ratio"],
        ]
        table.add_row(f"{row['vocabulary']:,}", str(row["clients"]), *(f"{value:.3g}" for value in figures))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
