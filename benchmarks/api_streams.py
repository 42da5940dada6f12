"""How evenly do tokens come when fifty clients of the HTTP API read their answers at the same time?

    python -m benchmarks.api_streams                       fifty streams for three minutes
    python -m benchmarks.api_streams --seconds 30 --json   shorter, and as JSON
    python -m benchmarks.api_streams --write               into benchmarks/results/api-streams-tiny-chat.json
    python -m benchmarks.api_streams --own-swarm           with the servers in the API's process

`swarmkit api` runs in a process of its own, over two servers of tiny-chat in a process each, over p2p daemons
on loopback. This process has the clients, which speak HTTP and nothing else. Each asks for one answer after
the other, of 40 to 120 tokens, half of them greedy and half sampled, until the time is over: prompts are
computed beside the tokens of others all the time. The first seconds are not counted.

Reported:

    median_ms, p99_ms, most_ms   time between two pieces of an answer as its client reads them
    ratio                        p99_ms / median_ms, which is to be 3 at most
    first_median_ms, first_p99_ms   time to the first piece
    answers, pieces_per_s, failed
    cpu                          processor seconds per second: of the API, the servers, and the clients
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from swarmkit import LocalSwarm
from swarmkit.bench.environment import environment

RESULT = Path(__file__).parent / "results" / "api-streams-tiny-chat.json"
ANIMALS = ("fox", "hen", "cow", "dog", "cat", "owl", "pig", "goat", "duck", "horse")
_WARM_UP_S = 5.0
_TIMEOUT_S = 120.0


@dataclass
class Seen:
    """What the clients saw, in seconds since the epoch of `time.perf_counter`."""

    answers: list[list[float]] = field(default_factory=list)
    """When each answer was asked for, and when each piece of it came."""
    failed: list[str] = field(default_factory=list)


@contextmanager
def served(addresses: Sequence[str]) -> Iterator[tuple[str, int]]:
    """`swarmkit api` in a process of its own; its URL and its process id."""
    command = [sys.executable, "-m", "swarmkit.cli", "api", "tiny-chat", "--port", "0", "--json"]
    command += [part for address in addresses for part in ("--join", address)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"], process.pid
    finally:
        process.terminate()
        process.wait(30)


def request(draw: random.Random) -> dict[str, Any]:
    """A story, which may end by itself before it has all tokens."""
    sampling = {"temperature": 0.8, "seed": draw.randrange(2**32)} if draw.random() < 0.5 else {}
    return {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": f"Tell me a story about a {draw.choice(ANIMALS)}."}],
        "max_tokens": draw.randint(40, 120),
        "stream": True,
        **sampling,
    }


async def read_answer(client: httpx.AsyncClient, body: dict[str, Any], seen: Seen) -> None:
    """Ask, and note when each piece comes."""
    times = [time.perf_counter()]
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    choices = json.loads(line[6:]).get("choices")
                    if not choices:
                        seen.failed.append(line)
                    elif choices[0]["delta"].get("content"):
                        times.append(now)
    except httpx.HTTPError as error:
        seen.failed.append(repr(error))
    seen.answers.append(times)


async def read_on(client: httpx.AsyncClient, number: int, until: float, seen: Seen) -> None:
    """One client, who reads answer after answer."""
    draw = random.Random(number)
    while time.perf_counter() < until:
        await read_answer(client, request(draw), seen)


async def load(url: str, streams: int, seconds: float) -> tuple[Seen, float]:
    """So many clients for so long; what they saw, and when that begins to count."""
    seen, begin = Seen(), time.perf_counter() + _WARM_UP_S
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as client:
        await asyncio.gather(*(read_on(client, number, begin + seconds, seen) for number in range(streams)))
    return seen, begin


def cpu_seconds(*processes: psutil.Process) -> float:
    """Processor time that processes have used, with all that they have started."""
    family = [each for process in processes for each in (process, *process.children(recursive=True))]
    return sum(sum(each.cpu_times()[:2]) for each in family)


def measure(streams: int, seconds: float, own_swarm: bool = False) -> dict[str, Any]:
    """Start a swarm and an API, and read from it."""
    with ExitStack() as owned:
        addresses: Sequence[str] = ()
        if not own_swarm:
            addresses = owned.enter_context(LocalSwarm("tiny-chat", 2, processes=True)).initial_peers
        url, pid = owned.enter_context(served(addresses))
        here, api = psutil.Process(), psutil.Process(pid)
        servers = [each for each in here.children() if each.pid != pid]
        parts = {"api": [api], "servers": servers}
        before = {name: cpu_seconds(*its) for name, its in parts.items()}
        own, began = sum(here.cpu_times()[:2]), time.perf_counter()
        seen, begin = asyncio.run(load(url, streams, seconds))
        took = time.perf_counter() - began
        used = {name: (cpu_seconds(*its) - before[name]) / took for name, its in parts.items()}
        used["clients"] = (sum(here.cpu_times()[:2]) - own) / took
    end = begin + seconds
    between = sorted(
        later - earlier
        for _, *pieces in seen.answers
        for earlier, later in pairwise(pieces)
        if begin <= earlier and later <= end
    )
    first = sorted(pieces[0] - asked for asked, *pieces in seen.answers if pieces and asked >= begin)
    median, p99 = statistics.median(between), between[len(between) * 99 // 100]
    return {
        "streams": streams,
        "seconds": seconds,
        "own_swarm": own_swarm,
        "median_ms": round(median * 1e3, 2),
        "p99_ms": round(p99 * 1e3, 2),
        "most_ms": round(between[-1] * 1e3, 2),
        "ratio": round(p99 / median, 3),
        "first_median_ms": round(statistics.median(first) * 1e3, 2),
        "first_p99_ms": round(first[len(first) * 99 // 100] * 1e3, 2),
        "answers": len(seen.answers),
        "pieces_per_s": round(len(between) / seconds, 1),
        "failed": len(seen.failed),
        "cpu": {name: round(value, 2) for name, value in used.items()},
    }


def main() -> int:
    """Measure and print; returns whether the goal was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--own-swarm", action="store_true", help="let the API start its own swarm")
    parser.add_argument("--json", action="store_true", help="print JSON, with the machine and the versions")
    parser.add_argument("--write", action="store_true", help=f"write that to {RESULT.name}")
    given = parser.parse_args()
    found = measure(given.streams, given.seconds, given.own_swarm)
    command = {"command": "python -m benchmarks.api_streams " + " ".join(sys.argv[1:])}
    whole = {"benchmark": "api streams", **environment(), **command, **found}
    if given.write:
        RESULT.write_text(json.dumps(whole, indent=2) + "\n")
    if given.json:
        print(json.dumps(whole, indent=2))
    else:
        print("\n".join(f"{name:16} {value}" for name, value in found.items()))
    return int(bool(found["failed"]) or found["ratio"] > 3)


if __name__ == "__main__":
    sys.exit(main())
