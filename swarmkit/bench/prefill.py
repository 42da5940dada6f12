"""How long is the wait for the first token of a long prompt?"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from swarmkit.bench.measure import (
    PATIENT,
    median_ratio,
    must_be_equal,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.options import Prefill
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local


def measure(options: Prefill, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """The first token of a prompt: swarm against local, in turns; each round has a prompt of its own.

    A prompt that was seen before might be answered from a cache. The first round is not counted.
    """
    torch.set_num_threads(options.threads)
    local = load_local(subject.checkpoint, dtype=options.dtype)
    results = []
    for count in options.stages:
        here, there = [], []
        on_progress(f"{count} stages", 0, options.rounds + 1)
        with LocalSwarm(
            subject.checkpoint,
            num_stages=count,
            processes=True,
            threads=options.threads,
            dtype=options.dtype,
            client_settings=PATIENT,
        ) as swarm:
            remote = swarm.model(dtype=options.dtype)
            for number in range(options.rounds + 1):
                prompt = random_prompt(subject.vocab_size, options.prompt_tokens, seed=number)
                one = timed_generate(local, prompt, 1)
                other = timed_generate(remote, prompt, 1)
                must_be_equal(one.tokens, other.tokens, options.dtype)
                if number:
                    here.append(one.first_token_s)
                    there.append(other.first_token_s)
                on_progress(f"{count} stages", number + 1, options.rounds + 1)
        results.append(
            {
                "stages": count,
                "first_token_s": round(statistics.median(there), 4),
                "local_first_token_s": round(statistics.median(here), 4),
                "ratio_to_local": round(median_ratio(there, here), 3),
            }
        )
    return {
        **options.values("prompt_tokens", "rounds", "threads", "dtype"),
        "results": results,
    }
