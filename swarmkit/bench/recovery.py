"""What does it cost, while nothing fails, that everything could?"""

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
from swarmkit.bench.options import Recovery
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local.swarm import LocalSwarm

_PROMPT_TOKENS = 16


def measure(options: Recovery, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Generate with recovery kept ready and with it switched off, in turns, over the same servers.

    Without it, the client keeps no inputs of any stage, and servers that hand their outputs on do not send
    them to the client. The first round is not counted.
    """
    torch.set_num_threads(options.threads)
    prompt = random_prompt(subject.vocab_size, _PROMPT_TOKENS)
    ready_s, without_s = [], []
    on_progress("starting", 0, options.rounds + 1)
    with LocalSwarm(
        subject.checkpoint,
        num_stages=options.stages,
        processes=True,
        threads=options.threads,
        dtype=options.dtype,
    ) as swarm:
        ready = swarm.model(dtype=options.dtype, settings=PATIENT)
        without = swarm.model(dtype=options.dtype, settings=PATIENT.replace(recovery=False))
        for number in range(options.rounds + 1):
            one = timed_generate(ready, prompt, options.tokens)
            other = timed_generate(without, prompt, options.tokens)
            must_be_equal(one.tokens, other.tokens, options.dtype)
            if number:
                ready_s.append(one.total_s)
                without_s.append(other.total_s)
            on_progress("generated with and without recovery", number + 1, options.rounds + 1)
    return {
        **options.values("stages", "tokens", "rounds", "threads", "dtype"),
        "tokens_per_s": round(options.tokens / statistics.median(ready_s), 2),
        "tokens_per_s_without": round(options.tokens / statistics.median(without_s), 2),
        "ratio_to_without": round(median_ratio(without_s, ready_s), 3),
    }
