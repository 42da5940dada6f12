"""How long does a training step take through a swarm, and how does it grow with replicas?"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from swarmkit.bench.measure import PATIENT, median_ratio
from swarmkit.bench.options import Train
from swarmkit.bench.progress import Progress, quiet
from swarmkit.bench.subject import Subject
from swarmkit.local.swarm import LocalSwarm
from swarmkit.models.head.head import load_local

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class _TrainingStep:
    """One forward and one backward pass: seconds of each, and the gradient of the embeddings."""

    forward_s: float
    backward_s: float
    gradient: torch.Tensor

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


class _Compared:
    """Steps of the local model and of the swarm, which have the same gradients."""

    def __init__(self, dtype: str) -> None:
        self.steps: list[tuple[_TrainingStep, _TrainingStep]] = []
        self.difference = 0.0
        """The largest between their gradients."""
        self._dtype = dtype

    def add(self, here: _TrainingStep, there: _TrainingStep, *, counts: bool) -> None:
        """Check one pair, and keep it if it counts."""
        self.difference = max(self.difference, _difference(here.gradient, there.gradient, self._dtype))
        if counts:
            self.steps.append((here, there))

    def ratios(self) -> dict[str, float]:
        """Of the swarm's time to the local model's."""
        return {
            "forward_ratio_to_local": _ratio(
                [there.forward_s for _, there in self.steps], [here.forward_s for here, _ in self.steps]
            ),
            "both_ratio_to_local": _ratio(
                [there.both_s for _, there in self.steps], [here.both_s for here, _ in self.steps]
            ),
        }


def measure(options: Train, subject: Subject, on_progress: Progress = quiet) -> dict[str, Any]:
    """A training step of prompts: swarm against local, in turns; each round has a batch of its own.

    What is trained is the input of the first block. The loss is the usual one, so that the output layer takes
    part, which the client computes by itself, while its servers wait. Then the same without it (`blocks_…`):
    the mean square of what comes out of the last block is the loss, and all that is left is the
    servers'. Everybody runs `threads` threads. The first round is not counted.

    Raises:
        AssertionError: in float32 the gradients differ, so that what was timed is not the same work.
    """
    torch.set_num_threads(options.threads)
    local = load_local(subject.checkpoint, dtype=options.dtype)
    results = []
    for count in options.replicas:
        whole, blocks = _Compared(options.dtype), _Compared(options.dtype)
        what = f"{count} replicas of {options.stages} stages"
        on_progress(what, 0, options.rounds + 1)
        with LocalSwarm(
            subject.checkpoint,
            num_stages=options.stages,
            replicas=count,
            processes=True,
            threads=options.threads,
            dtype=options.dtype,
            client_settings=PATIENT,
        ) as swarm:
            remote = swarm.model(dtype=options.dtype)
            for number in range(options.rounds + 1):
                ids = _ids(subject.vocab_size, options.batch, options.tokens, number)
                before = replace(remote.traffic)
                whole.add(_step(local, ids), _step(remote, ids), counts=bool(number))
                after = replace(remote.traffic)
                blocks.add(_step(local, ids, head=False), _step(remote, ids, head=False), counts=bool(number))
                on_progress(what, number + 1, options.rounds + 1)
        results.append(
            {
                "replicas": count,
                "servers": count * options.stages,
                **whole.ratios(),
                "forward_s": _median([there.forward_s for _, there in whole.steps]),
                "both_s": _median([there.both_s for _, there in whole.steps]),
                "local_forward_s": _median([here.forward_s for here, _ in whole.steps]),
                "local_both_s": _median([here.both_s for here, _ in whole.steps]),
                **{f"blocks_{name}": ratio for name, ratio in blocks.ratios().items()},
                "bytes_sent_per_step": after.sent - before.sent,
                "bytes_received_per_step": after.received - before.received,
                "requests_per_step": after.requests - before.requests,
                "largest_gradient_difference": max(whole.difference, blocks.difference),
            }
        )
    return {
        **options.values("stages", "batch", "tokens", "rounds", "threads", "dtype"),
        "results": results,
    }


def _ids(vocab_size: int, batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _step(model: Any, ids: torch.Tensor, *, head: bool = True) -> _TrainingStep:
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    gc.collect()
    began = time.perf_counter()
    if head:
        loss = model(inputs_embeds=inputs, labels=ids, use_cache=False).loss
    else:
        loss = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state.square().mean()
    middle = time.perf_counter()
    loss.backward()
    ended = time.perf_counter()
    return _TrainingStep(middle - began, ended - middle, inputs.grad)


def _difference(wanted: torch.Tensor, found: torch.Tensor, dtype: str) -> float:
    difference = float((wanted - found).abs().max())
    if dtype == "float32" and not torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise AssertionError(f"the swarm's gradients differ from the local model's by {difference:g}")
    return difference


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return round(median_ratio(above, below), 3)


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)
