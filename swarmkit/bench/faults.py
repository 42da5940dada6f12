"""How much of its speed does a swarm keep when connections break all the time?"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from swarmkit.bench.faulty_transport import Faults, with_faults
from swarmkit.bench.measure import (
    PATIENT,
    median_ratio,
    must_be_equal,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.options import FaultsBenchmark
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.events import PeerLost
from swarmkit.local.swarm import LocalSwarm
from swarmkit.net.connect import over_hivemind

_PROMPT_TOKENS = 16


def measure(options: FaultsBenchmark, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Generate with each of the client's sends failing with a probability, and without, in turns.

    A send that fails closes its stream, so that the server forgets the session; both clients use the same
    servers. Which sends fail is drawn from `seed` anew for each round. The first round is not counted.
    """
    torch.set_num_threads(options.threads)
    prompt = random_prompt(subject.vocab_size, _PROMPT_TOKENS)
    clean_s, faulty_s, sends, failed, lost, equal = [], [], 0, 0, 0, 0
    on_progress("starting", 0, options.rounds + 1)
    with LocalSwarm(
        subject.checkpoint,
        num_stages=options.stages,
        replicas=options.replicas,
        processes=True,
        threads=options.threads,
        dtype=options.dtype,
        client_settings=PATIENT,
    ) as swarm:
        steady = swarm.model(dtype=options.dtype)
        for number in range(options.rounds + 1):
            clean = timed_generate(steady, prompt, options.tokens)
            faults = Faults(options.probability, options.seed * (options.rounds + 1) + number)
            transport = with_faults(over_hivemind(swarm.initial_peers, client_mode=True), faults)
            with swarm.model(dtype=options.dtype, transport=transport) as struck:
                faulty = timed_generate(struck, prompt, options.tokens)
                losses = [event for event in struck.events if isinstance(event, PeerLost)]
            same = must_be_equal(clean.tokens, faulty.tokens, options.dtype)
            if number:
                clean_s.append(clean.total_s)
                faulty_s.append(faulty.total_s)
                sends, failed, lost = sends + faults.sends, failed + faults.failed, lost + len(losses)
                equal += same
            on_progress("generated with faults", number + 1, options.rounds + 1)
    return {
        **options.values("stages", "replicas", "tokens", "probability", "rounds", "threads", "dtype", "seed"),
        "equal": equal,
        "sends": sends,
        "failed_sends": failed,
        "servers_lost": lost,
        "tokens_per_s": round(options.tokens / statistics.median(faulty_s), 2),
        "fault_free_tokens_per_s": round(options.tokens / statistics.median(clean_s), 2),
        "ratio_to_fault_free": round(median_ratio(clean_s, faulty_s), 3),
    }
