"""How long does a training step take through a swarm, and how does it grow with replicas?"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swarmkit.bench.measure import PATIENT, Progress, median_ratio, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local import LocalSwarm
from swarmkit.models.head import load_local

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class _Step:
    """One forward and one backward pass: seconds of each, and the gradient of the embeddings."""

    forward_s: float
    backward_s: float
    gradient: torch.Tensor

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


def bench_train(
    subject: Subject,
    replicas: Sequence[int],
    *,
    stages: int = 2,
    batch: int = 8,
    tokens: int = 128,
    rounds: int = 5,
    threads: int = 1,
    dtype: str = "float32",
    on_progress: Progress = quiet,
) -> dict[str, Any]:
    """A training step of prompts: swarm against local, in turns; each round has a batch of its own.

    What is trained is the input of the first block. The loss is the usual one, so that embeddings and the
    output layer, which both sides have, take part. Servers run one thread each, and so does the local model.
    The first round is not counted.

    Raises:
        AssertionError: in float32 the gradients differ, so that what was timed is not the same work.
    """
    torch.set_num_threads(threads)
    local = load_local(subject.checkpoint, dtype=dtype)
    results = []
    for count in replicas:
        here: list[_Step] = []
        there: list[_Step] = []
        what = f"{count} replicas of {stages} stages"
        on_progress(what, 0, rounds + 1)
        with LocalSwarm(
            subject.checkpoint,
            num_stages=stages,
            replicas=count,
            processes=True,
            threads=threads,
            dtype=dtype,
            client_settings=PATIENT,
        ) as swarm:
            remote = swarm.model(dtype=dtype)
            difference = 0.0
            for number in range(rounds + 1):
                ids = _ids(subject.vocab_size, batch, tokens, number)
                before = (remote.traffic.sent, remote.traffic.received, remote.traffic.requests)
                pair = _step(local, ids), _step(remote, ids)
                difference = max(difference, _difference(pair[0].gradient, pair[1].gradient, dtype))
                if number:
                    here.append(pair[0])
                    there.append(pair[1])
                on_progress(what, number + 1, rounds + 1)
            traffic = remote.traffic
        results.append(
            {
                "replicas": count,
                "servers": count * stages,
                "forward_ratio_to_local": _ratio([s.forward_s for s in there], [s.forward_s for s in here]),
                "both_ratio_to_local": _ratio([s.both_s for s in there], [s.both_s for s in here]),
                "forward_s": _median([s.forward_s for s in there]),
                "both_s": _median([s.both_s for s in there]),
                "local_forward_s": _median([s.forward_s for s in here]),
                "local_both_s": _median([s.both_s for s in here]),
                "bytes_sent_per_step": traffic.sent - before[0],
                "bytes_received_per_step": traffic.received - before[1],
                "requests_per_step": traffic.requests - before[2],
                "largest_gradient_difference": difference,
            }
        )
    return {
        "model": subject.label,
        "stages": stages,
        "batch": batch,
        "tokens": tokens,
        "rounds": rounds,
        "threads": threads,
        "dtype": dtype,
        "results": results,
    }


def _ids(vocab_size: int, batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _step(model: Any, ids: torch.Tensor) -> _Step:
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    gc.collect()
    began = time.perf_counter()
    loss = model(inputs_embeds=inputs, labels=ids, use_cache=False).loss
    middle = time.perf_counter()
    loss.backward()
    ended = time.perf_counter()
    return _Step(middle - began, ended - middle, inputs.grad)


def _difference(wanted: torch.Tensor, found: torch.Tensor, dtype: str) -> float:
    difference = float((wanted - found).abs().max())
    if dtype == "float32" and not torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise AssertionError(f"the swarm's gradients differ from the local model's by {difference:g}")
    return difference


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return round(median_ratio(above, below), 3)


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)
