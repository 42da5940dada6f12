"""How many more tokens does a swarm give when many ask at once?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch

from swarmkit.bench.load import Load, Steps, start_loads, together
from swarmkit.bench.measure import (
    PATIENT,
    median_ratio,
    must_be_equal,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.options import Clients
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local


def measure(options: Clients, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Tokens per second of so many clients at once, and the ratio to one client in the same round.

    The clients send random hidden states from `load_processes` processes, and begin to count when all of them
    have their prompts behind them. The numbers of clients take turns, round by round; the first round is
    not counted. `client_cpu_share` is what the clients took of the machine: if it is large, they were what
    was measured. At the end, `generate()` runs in as many threads as the second number says, and each answer
    is compared with the local model's.
    """
    torch.set_num_threads(options.threads)
    results = []
    for dtype in options.dtype:
        seen: dict[int, list[Steps]] = {count: [] for count in options.clients}
        on_progress(dtype, 0, options.rounds + 2)
        with LocalSwarm(
            subject.checkpoint,
            num_stages=options.stages,
            processes=True,
            threads=options.threads,
            dtype=dtype,
            client_settings=PATIENT,
        ) as swarm:
            with start_loads(
                subject, swarm, min(options.load_processes, max(options.clients)), dtype
            ) as loads:
                for number in range(options.rounds + 1):
                    for count in options.clients:
                        steps = _run(loads, count, options.tokens, options.prompt_tokens)
                        if number:
                            seen[count].append(steps)
                    on_progress(dtype, number + 1, options.rounds + 2)
            callers = sorted(options.clients)[min(1, len(options.clients) - 1)]
            equal = _generate_at_once(subject, swarm, dtype, callers, options.tokens)
            on_progress(dtype, options.rounds + 2, options.rounds + 2)
        results.append(
            {
                "dtype": dtype,
                "generate": {"clients": callers, "equal": equal},
                "clients": [
                    _row(count, seen[count], seen[min(options.clients)]) for count in options.clients
                ],
            }
        )
    return {
        **options.values("stages", "tokens", "prompt_tokens", "rounds", "threads", "load_processes"),
        "results": results,
    }


def shares(count: int, processes: int) -> list[int]:
    """`count` clients over processes, as evenly as it goes."""
    return [count // processes + (number < count % processes) for number in range(processes)]


def _run(loads: Sequence[Load], count: int, tokens: int, prompt_tokens: int) -> Steps:
    busy = [(load, share) for load, share in zip(loads, shares(count, len(loads)), strict=True) if share]
    for load, share in busy:
        load.ask("open", sessions=share, prompt=prompt_tokens, max_length=prompt_tokens + tokens)
    for load, _ in busy:
        load.tell("decode", tokens=tokens)
    steps = together([load.steps() for load, _ in busy])
    for load, _ in busy:
        load.ask("close")
    return steps


def _row(count: int, rounds: Sequence[Steps], of_one: Sequence[Steps]) -> dict[str, Any]:
    rates = [_rate(steps) for steps in rounds]
    cores = psutil.cpu_count() or 1
    return {
        "clients": count,
        "tokens_per_s": round(statistics.median(rates), 2),
        "ratio_to_one": round(median_ratio(rates, [_rate(steps) for steps in of_one]), 3),
        "ms_per_token": round(statistics.median(ms for steps in rounds for ms in steps.latencies_ms), 2),
        "client_cpu_share": round(
            statistics.median(steps.cpu_s / (steps.seconds * cores) for steps in rounds), 3
        ),
    }


def _rate(steps: Steps) -> float:
    return len(steps.spans) / steps.seconds


def _generate_at_once(subject: Subject, swarm: LocalSwarm, dtype: str, callers: int, tokens: int) -> int:
    """How many of so many concurrent answers are the local model's; in float32 all have to be."""
    local = load_local(subject.checkpoint, dtype=dtype)
    prompts = [random_prompt(subject.vocab_size, 16, seed=number) for number in range(callers)]
    expected = [timed_generate(local, prompt, tokens).tokens for prompt in prompts]
    with swarm.model(dtype=dtype) as remote, ThreadPoolExecutor(callers, "swarmkit-bench") as pool:
        answers = [pool.submit(timed_generate, remote, prompt, tokens) for prompt in prompts]
        found = [answer.result().tokens for answer in answers]
    return sum(must_be_equal(one, other, dtype) for one, other in zip(expected, found, strict=True))
