"""How much of its speed does a swarm keep when connections break all the time?"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from swarmkit.bench.faulty_transport import Faults, with_faults
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
from swarmkit.events import PeerLost
from swarmkit.local.swarm import LocalSwarm
from swarmkit.net.connect import over_hivemind

_PROMPT_TOKENS = 16


def bench_faults(
    subject: Subject,
    *,
    probability: float = 1e-3,
    tokens: int = 1024,
    stages: int = 2,
    replicas: int = 2,
    rounds: int = 3,
    threads: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """Generate with each of the client's sends failing with a probability, and without, in turns.

    A send that fails closes its stream, so that the server forgets the session; both clients use the same
    servers. Which sends fail is drawn from `seed` anew for each round. The first round is not counted.
    """
    torch.set_num_threads(threads)
    prompt = random_prompt(subject.vocab_size, _PROMPT_TOKENS)
    clean_s, faulty_s, sends, failed, lost, equal = [], [], 0, 0, 0, 0
    on_progress("starting", 0, rounds + 1)
    with LocalSwarm(
        subject.checkpoint,
        num_stages=stages,
        replicas=replicas,
        processes=True,
        threads=threads,
        dtype=dtype,
        client_settings=PATIENT,
    ) as swarm:
        steady = swarm.model(dtype=dtype)
        for number in range(rounds + 1):
            clean = timed_generate(steady, prompt, tokens)
            faults = Faults(probability, seed * (rounds + 1) + number)
            transport = with_faults(over_hivemind(swarm.initial_peers, client_mode=True), faults)
            with swarm.model(dtype=dtype, transport=transport) as struck:
                faulty = timed_generate(struck, prompt, tokens)
                losses = [event for event in struck.events if isinstance(event, PeerLost)]
            same = must_be_equal(clean.tokens, faulty.tokens, dtype)
            if number:
                clean_s.append(clean.total_s)
                faulty_s.append(faulty.total_s)
                sends, failed, lost = sends + faults.sends, failed + faults.failed, lost + len(losses)
                equal += same
            on_progress("generated with faults", number + 1, rounds + 1)
    return {
        "model": subject.label,
        "stages": stages,
        "replicas": replicas,
        "tokens": tokens,
        "probability": probability,
        "rounds": rounds,
        "threads": threads,
        "dtype": dtype,
        "seed": seed,
        "equal": equal,
        "sends": sends,
        "failed_sends": failed,
        "servers_lost": lost,
        "tokens_per_s": round(tokens / statistics.median(faulty_s), 2),
        "fault_free_tokens_per_s": round(tokens / statistics.median(clean_s), 2),
        "ratio_to_fault_free": round(median_ratio(clean_s, faulty_s), 3),
    }
