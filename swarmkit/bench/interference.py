"""What does one client's long prompt do to another one's tokens?"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from swarmkit.bench.load import Load, Steps, start_loads
from swarmkit.bench.measure import PATIENT, median_ratio, percentile
from swarmkit.bench.options import Interference
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local.swarm import LocalSwarm

_PROMPT_TOKENS = 16
_ROOM = 65_536
"""The longest that the decoding session may become while the other one's prompt lasts."""


def measure(options: Interference, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """One client decodes alone for `tokens` tokens, then while another one's prompt is computed, in turns.

    Of the second part those steps count that overlap with the prompt. Both clients are processes of their
    own, and send random hidden states. The first round is not counted; percentiles are taken of each round,
    then their median, and over all rounds as well.
    """
    torch.set_num_threads(options.threads)
    alone, beside, prompt_s = [], [], []
    on_progress("starting", 0, options.rounds + 1)
    with (
        LocalSwarm(
            subject.checkpoint,
            num_stages=options.stages,
            processes=True,
            threads=options.threads,
            dtype=options.dtype,
            client_settings=PATIENT,
        ) as swarm,
        start_loads(subject, swarm, 2, options.dtype) as (patient, greedy),
    ):
        for number in range(options.rounds + 1):
            quiet_steps = _decode(patient, options.tokens)
            disturbed_steps, seconds = _decode_beside(patient, greedy, options.prefill_tokens)
            if number:
                alone.append(quiet_steps)
                beside.append(disturbed_steps)
                prompt_s.append(seconds)
            on_progress("decoded beside a prompt", number + 1, options.rounds + 1)
    p99_alone = [percentile(steps.latencies_ms, 0.99) for steps in alone]
    p99_beside = [percentile(steps.latencies_ms, 0.99) for steps in beside]
    return {
        **options.values("stages", "prefill_tokens", "rounds", "threads", "dtype"),
        "prefill_s": round(statistics.median(prompt_s), 3),
        "alone": _summary(alone),
        "beside": _summary(beside),
        "ratio_p99": round(median_ratio(p99_beside, p99_alone), 3),
    }


def _decode(client: Load, tokens: int) -> Steps:
    client.ask("open", sessions=1, prompt=_PROMPT_TOKENS, max_length=_PROMPT_TOKENS + tokens)
    client.tell("decode", tokens=tokens)
    steps = client.steps()
    client.ask("close")
    return steps


def _decode_beside(client: Load, other: Load, prefill_tokens: int) -> tuple[Steps, float]:
    """What one client did while the other one's prompt was computed, and how long that took, in seconds."""
    client.ask("open", sessions=1, prompt=_PROMPT_TOKENS, max_length=_ROOM)
    client.tell("decode", tokens=None)
    prompt = other.ask("prefill", tokens=prefill_tokens)
    client.tell("stop")
    steps = client.steps().beside(prompt["began"], prompt["ended"])
    client.ask("close")
    return steps, prompt["ended"] - prompt["began"]


def _summary(rounds: list[Steps]) -> dict[str, Any]:
    latencies = [ms for steps in rounds for ms in steps.latencies_ms]
    return {
        "steps": len(latencies),
        "p50_ms": round(percentile(latencies, 0.5), 3),
        "p99_ms": round(percentile(latencies, 0.99), 3),
        "max_ms": round(max(latencies), 3),
    }
