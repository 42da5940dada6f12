"""What the benchmarks share: how generation is timed, and how times become numbers."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from swarmkit.settings import ClientSettings

PATIENT = ClientSettings().replace(
    first_step_timeout_s=600.0, min_step_timeout_s=120.0, trace_steps=4096, speculation="off"
)
"""A machine that is measured is busy: its servers must not be taken for lost. Nothing is guessed."""


@dataclass(frozen=True)
class Generated:
    """One timed call of `generate()`: when it began, and when the prompt and each new token came."""

    tokens: torch.Tensor
    began: float
    stamps: tuple[float, ...]
    came: tuple[int, ...] = ()
    """Tokens that came at each stamp: the prompt's, and 1 each unless some were guessed."""

    @property
    def tokens_per_s(self) -> float:
        """After the first step, which pays for the prompt."""
        return sum(self.came[2:]) / (self.stamps[-1] - self.stamps[1])

    @property
    def first_token_s(self) -> float:
        """From the call to the first new token."""
        return self.stamps[1] - self.began

    @property
    def total_s(self) -> float:
        return self.stamps[-1] - self.began

    @property
    def ms_per_token(self) -> float:
        """The median wait for a token after the first one, which pays for the prompt."""
        return statistics.median(b - a for a, b in pairwise(self.stamps[1:])) * 1e3


class _Stamps:
    """A streamer that notes the time only."""

    takes_several = True

    def __init__(self) -> None:
        self.times: list[float] = []
        self.came: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.came.append(value.numel())

    def end(self) -> None:
        pass


def timed_generate(
    model: Any, prompt: torch.Tensor, new_tokens: int, *, collects: bool = True, **options: Any
) -> Generated:
    """Greedy generation of exactly `new_tokens` after `prompt` [1, tokens].

    Args: collects: whether to look for garbage before. Where several threads are timed together, each would
        wait for that of all others, within the others' time.
    """
    stamps = _Stamps()
    if collects:
        gc.collect()
    began = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=stamps,
        **options,
    )
    return Generated(out, began, tuple(stamps.times), tuple(stamps.came))


def random_prompt(vocab_size: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids [1, tokens], none of them a special one of small number."""
    return torch.randint(3, vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))


def must_be_equal(expected: torch.Tensor, found: torch.Tensor, dtype: str) -> bool:
    """Whether two answers are the same; in float32 they have to be.

    Raises:
        AssertionError: they differ in float32, so that what was timed is not the model.
    """
    equal = torch.equal(expected, found)
    if dtype == "float32" and not equal:
        raise AssertionError("the swarm's tokens differ from the local model's")
    return equal


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Base and slope of y = base + slope · x by least squares; None if all x are the same."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(set(xs)) < 2:
        return None
    line = statistics.linear_regression(xs, ys)
    return line.intercept, line.slope


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0 to 1) of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of ratios within rounds, so that a drift of the machine meets both sides of each."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
