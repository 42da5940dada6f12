"""Sessions of three blocks in the middle of a tiny model, each with a twin that is run alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swarmkit.models.execution.stage import Stage, StepPart

from .tiny import PROMISED, RECURRENT

ONE_BY_ONE = {"bloom", "falcon", "mpt", "stablelm", *RECURRENT}
"""Model types that are not on transformers' attention interface, or have a state."""


def some_slowly(name: str) -> object:
    return pytest.param(name, marks=() if name in PROMISED else pytest.mark.slow)


def hidden(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 32, generator=torch.Generator().manual_seed(1000 * seed + tokens))


class Session:
    """A session that is run in packs, and its twin that is run alone."""

    def __init__(self, stage: Stage, rows: int = 1, padding: int = 0, seed: int = 0) -> None:
        self.stage = stage
        self.rows = rows
        self.seed = seed
        self.cache, self.twin = stage.new_cache(1, 4), stage.new_cache(1, 4)
        self.mask: Tensor | None = None
        if padding:
            self.mask = torch.ones(rows, 64)
            self.mask[0, :padding] = 0

    def step(self, tokens: int) -> tuple[StepPart, Tensor]:
        """A step, and what it yields alone."""
        past = self.twin.tokens
        self.seed += 1
        given = hidden(self.rows, tokens, self.seed)
        mask = positions = None
        if self.mask is not None:
            mask = self.mask[:, : past + tokens]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:].long()
        wanted = self.stage.forward(given, self.twin, attention_mask=mask, position_ids=positions)
        return StepPart(given, self.cache, mask, positions), wanted

    def edit(self, keep: int, order: list[int] | None = None) -> None:
        for cache in (self.cache, self.twin):
            cache.edit(keep, order)


def assert_equal(results: list[Tensor | Exception], parts: list[StepPart], wanted: list[Tensor]) -> None:
    for result, part, want in zip(results, parts, wanted, strict=True):
        assert isinstance(result, Tensor), result
        result, want = result.cpu(), want.cpu()
        if part.attention_mask is not None:  # what stands at padding means nothing
            real = part.attention_mask[:, -result.shape[1] :, None]
            result, want = result * real, want * real
        assert (result - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


def together(sessions: list[Session], tokens: list[int]) -> None:
    """One step of each session, of so many tokens; checked."""
    steps = [session.step(count) for session, count in zip(sessions, tokens, strict=True)]
    parts = [part for part, _ in steps]
    assert_equal(sessions[0].stage.forward_many(parts), parts, [wanted for _, wanted in steps])


def decode_beside_a_prompt(stage: Stage) -> None:
    """One session decodes three tokens: alone, while another one's prompt runs, and beside its token."""
    sitting, coming = Session(stage, seed=1), Session(stage, seed=20)
    together([sitting], [5])
    together([sitting], [1])
    together([sitting, coming], [1, 7])
    together([sitting, coming], [1, 1])


def decode_and_cut_back(stage: Stage) -> None:
    """A session decodes three tokens: before and after it is cut back, and after several tokens at once."""
    session = Session(stage)
    together([session], [9])
    together([session], [1])
    session.edit(6)
    together([session], [1])
    together([session], [4])
    together([session], [1])
