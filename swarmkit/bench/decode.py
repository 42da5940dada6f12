"""What does each server of a chain add to a token? Decode over 1, 2, 4 … stages, against the local model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from swarmkit.bench.measure import (
    PATIENT,
    fit_line,
    median_ratio,
    must_be_equal,
    random_prompt,
    timed_generate,
)
from swarmkit.bench.options import Decode
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local
from swarmkit.models.quantization.precision import Precision
from swarmkit.settings import ServerSettings

_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class DecodeResult:
    """One chain length. Times are medians over rounds, in milliseconds per generated token.

    `added_ms_per_hop` is (swarm - local) / stages: everything that a hop costs beyond the model's own work,
    the split of that work included. `network_ms_per_hop` is the part between client and server, both
    ways, as the client's trace has it.
    """

    stages: int
    swarm_ms_per_token: float
    local_ms_per_token: float
    added_ms_per_token: float
    tokens_per_s: float
    local_tokens_per_s: float
    ratio_to_local: float
    added_ms_per_hop: float
    network_ms_per_hop: float
    queue_ms_per_hop: float
    compute_ms_per_token: float


def measure(options: Decode, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """Measure greedy decoding of one row, servers as processes on loopback, `threads` torch threads each.

    Local and swarm take turns, round by round, so that a drift of the machine meets both. The first round of
    each is not counted. On an accelerator servers start a token's work as one piece that is on record
    (`models.recordings`), unless `records` is false. Over several chain lengths, the time beyond local is
    fitted as base + per server.
    """
    torch.set_num_threads(options.threads)
    checkpoint = subject.checkpoint
    computed = Precision.parse(options.dtype, checkpoint.config, options.device).dtype
    local = load_local(checkpoint, dtype=options.dtype, device=options.device)
    prompt = random_prompt(subject.vocab_size, _PROMPT_TOKENS).to(options.device)
    results = []
    for count in options.stages:
        total = options.rounds + 1
        on_progress(f"{count} stages", 0, total)
        with LocalSwarm(
            checkpoint,
            num_stages=count,
            processes=True,
            threads=options.threads,
            dtype=options.dtype,
            device=options.device,
            server_settings=ServerSettings()
            if options.records
            else ServerSettings().replace(cuda_graph_slots=0),
        ) as swarm:
            remote = swarm.model(dtype=computed, device=options.device, settings=PATIENT)
            times_local, times_swarm, hops = [], [], []
            for number in range(total):
                here = timed_generate(local, prompt, options.tokens)
                there = timed_generate(remote, prompt, options.tokens)
                must_be_equal(here.tokens, there.tokens, options.dtype)
                if number:
                    times_local.append(here.ms_per_token)
                    times_swarm.append(there.ms_per_token)
                    hops += [step.hops for step in remote.trace[-(options.tokens - 1) :] if step.tokens == 1]
                on_progress(f"{count} stages", number + 1, total)
            results.append(_result(count, times_local, times_swarm, hops))
    return {
        **options.values("tokens", "rounds", "threads", "dtype", "device"),
        "records": options.records and options.device != "cpu",
        "fit": fit_beyond_local(results),
        "results": [asdict(result) for result in results],
    }


def fit_beyond_local(results: Sequence[DecodeResult]) -> dict[str, float] | None:
    """Milliseconds per token beyond local = base + per_server · stages; None for a single chain length."""
    line = fit_line([(result.stages, result.added_ms_per_token) for result in results])
    return line and {"base_ms": round(line[0], 3), "per_server_ms": round(line[1], 3)}


def _result(count: int, local: list[float], swarm: list[float], hops: list[Any]) -> DecodeResult:
    local_ms, swarm_ms = statistics.median(local), statistics.median(swarm)
    added_ms = statistics.median(b - a for a, b in zip(local, swarm, strict=True))
    each = [hop for step in hops for hop in step]
    return DecodeResult(
        stages=count,
        swarm_ms_per_token=round(swarm_ms, 3),
        local_ms_per_token=round(local_ms, 3),
        added_ms_per_token=round(added_ms, 3),
        tokens_per_s=round(1e3 / swarm_ms, 1),
        local_tokens_per_s=round(1e3 / local_ms, 1),
        ratio_to_local=round(median_ratio(local, swarm), 3),
        added_ms_per_hop=round(added_ms / count, 3),
        network_ms_per_hop=round(statistics.median(hop.network_ms for hop in each), 3),
        queue_ms_per_hop=round(statistics.median(hop.queue_ms for hop in each), 3),
        compute_ms_per_token=round(statistics.median(sum(h.compute_ms for h in step) for step in hops), 3),
    )
