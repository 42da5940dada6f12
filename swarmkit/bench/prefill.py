"""How long is the wait for the first token of a long prompt?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from swarmkit.bench.measure import (
    PATIENT,
    Progress,
    median_ratio,
    must_be_equal,
    quiet,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.subject import Subject
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local


def bench_prefill(
    subject: Subject,
    stages: Sequence[int],
    *,
    prompt_tokens: int = 1024,
    rounds: int = 3,
    threads: int = 1,
    dtype: str = "float32",
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """The first token of a prompt: swarm against local, in turns; each round has a prompt of its own.

    A prompt that was seen before might be answered from a cache. The first round is not counted.
    """
    torch.set_num_threads(threads)
    local = load_local(subject.checkpoint, dtype=dtype)
    results = []
    for count in stages:
        here, there = [], []
        on_progress(f"{count} stages", 0, rounds + 1)
        with LocalSwarm(
            subject.checkpoint,
            num_stages=count,
            processes=True,
            threads=threads,
            dtype=dtype,
            client_settings=PATIENT,
        ) as swarm:
            remote = swarm.model(dtype=dtype)
            for number in range(rounds + 1):
                prompt = random_prompt(subject.vocab_size, prompt_tokens, seed=number)
                one = timed_generate(local, prompt, 1)
                other = timed_generate(remote, prompt, 1)
                must_be_equal(one.tokens, other.tokens, dtype)
                if number:
                    here.append(one.first_token_s)
                    there.append(other.first_token_s)
                on_progress(f"{count} stages", number + 1, rounds + 1)
        results.append(
            {
                "stages": count,
                "first_token_s": round(statistics.median(there), 4),
                "local_first_token_s": round(statistics.median(here), 4),
                "ratio_to_local": round(median_ratio(there, here), 3),
            }
        )
    return {
        "model": subject.label,
        "prompt_tokens": prompt_tokens,
        "rounds": rounds,
        "threads": threads,
        "dtype": dtype,
        "results": results,
    }
