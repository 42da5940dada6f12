"""What does it bring to have a large output layer computed by a server?

    python benchmarks/head.py --json > benchmarks/results/head.json     (about 3 minutes)

A random Llama with two blocks of hidden size 512 and a vocabulary of 128,000 tokens: its output layer has
262 MB in float32, which is nearly all that a client reads for a token. One server, a process of its own with
one torch thread, has the blocks and offers the output layer. Clients decode greedily, each in a thread of
this process with one torch thread, with the layer computed here (`local`), by the server (`remote`), or where
it is measured to be quicker (`auto`). The three take turns, round by round; the first round does not count.
The tokens are compared: they are the same in all three.

Server and clients share the memory of one machine, so that one client gains nothing: both read the same bytes
as fast. A client whose memory is slower than the server's gains by the ratio of the two, less the way. Many
clients gain on one machine as well, because the server reads the weights once for all that wait.

Reported for each number of clients: tokens per second of all together, and `ratio`, of the way to `local`,
median of the ratios within rounds. `local_ms` is one product of the output layer here while nothing else
runs; `served_ms` is an answer of the server to one client with its way, and `served_compute_ms` the server's
part of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from swarmkit.bench.environment import environment
from swarmkit.bench.random_llama import make_random_llama
from swarmkit.cli.console import quiet_transformers
from swarmkit.events import LogitsServed
from swarmkit.local.swarm import LocalSwarm
from swarmkit.settings import ClientSettings, ServerSettings

WAYS = ("local", "remote", "auto")
VOCABULARY, HIDDEN, BLOCKS = 128_000, 512, 2
PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Row:
    """So many clients at once, with the output layer computed in one way."""

    way: str
    clients: int
    tokens_per_s: float
    ratio: float


def answers(model: Any, clients: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens per second of so many clients at once, and their answers."""

    def one(number: int) -> list[int]:
        torch.set_num_threads(1)
        prompt = torch.randint(
            3, VOCABULARY, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(number)
        )
        whole = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        found: list[int] = whole[0, PROMPT_TOKENS:].tolist()
        return found

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        found = list(threads.map(one, range(clients)))
    return clients * tokens / (time.perf_counter() - began), found


def measure(models: dict[str, Any], clients: int, tokens: int, rounds: int) -> list[Row]:
    """The rows of a number of clients."""
    speeds: dict[str, list[float]] = {way: [] for way in models}
    for number in range(rounds + 1):
        found = {}
        for way, model in models.items():
            speed, found[way] = answers(model, clients, tokens)
            if number:
                speeds[way].append(speed)
        assert all(each == found["local"] for each in found.values()), "the tokens differ"
    return [
        Row(
            way,
            clients,
            round(statistics.median(speeds[way]), 2),
            round(statistics.median(a / b for a, b in zip(speeds[way], speeds["local"], strict=True)), 3),
        )
        for way in models
    ]


def local_ms(model: Any) -> float:
    """Milliseconds of one product of the output layer here."""
    layer, hidden = model.get_output_embeddings(), torch.randn(1, HIDDEN)
    times = []
    with torch.inference_mode():
        for _ in range(20):
            began = time.perf_counter()
            torch.nn.functional.linear(hidden, layer.weight)
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def main() -> int:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", default="1,8", help="numbers of clients, as in 1,8")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_random_llama(
            Path(folder),
            hidden_size=HIDDEN,
            num_blocks=BLOCKS,
            num_heads=8,
            intermediate_size=1408,
            vocab_size=VOCABULARY,
        )
        offered = ServerSettings().replace(offer_head=True)
        usual = ClientSettings().replace(speculation="off", prefix_cache_bytes=0, check_share=0.0)
        with LocalSwarm(checkpoint, 1, processes=True, server_settings=offered) as swarm:
            models = {way: swarm.model(settings=usual.replace(head=way)) for way in WAYS}
            rows = []
            for clients in map(int, options.clients.split(",")):
                rows += measure(models, clients, options.tokens, options.rounds)
                if clients == 1:
                    served = list(models["remote"].connection.client.events.kept(LogitsServed))
            here_ms = local_ms(models["local"])
            for model in models.values():
                model.close()
    result = {
        "benchmark": "head",
        **environment(),
        "command": " ".join(["python benchmarks/head.py", *sys.argv[1:]]),
        "vocabulary": VOCABULARY,
        "hidden": HIDDEN,
        "local_ms": round(here_ms, 2),
        "served_ms": round(statistics.median(one.total_ms for one in served), 2),
        "served_compute_ms": round(statistics.median(one.compute_ms for one in served), 2),
        "rows": [asdict(row) for row in rows],
    }
    if options.json:
        print(json.dumps(result))
        return 0
    table = Table("way", "clients", "tokens/s", "ratio to local")
    for row in rows:
        table.add_row(row.way, str(row.clients), f"{row.tokens_per_s:.1f}", f"{row.ratio:.3f}")
    Console().print(table)
    Console().print({name: result[name] for name in ("local_ms", "served_ms", "served_compute_ms")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
