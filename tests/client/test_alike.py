"""Rows that are the same prompt are found."""

from __future__ import annotations

import pytest
import torch

from swarmkit.client.session.duplicate_rows import DuplicateRows, alike_rows


def rows(*kinds: int) -> torch.Tensor:
    """[batch, 3, 4]; rows of one kind are equal."""
    return torch.stack([torch.rand(3, 4, generator=torch.Generator().manual_seed(kind)) for kind in kinds])


@pytest.mark.parametrize(
    ("kinds", "first", "order"),
    [
        ((1, 1, 1), [0], [0, 0, 0]),
        ((1, 1, 2, 2), [0, 2], [0, 0, 1, 1]),
        ((1, 2, 2), [0, 1], [0, 1, 1]),
    ],
)
def test_a_row_that_equals_the_one_before_it_is_a_repetition(
    kinds: tuple[int, ...], first: list[int], order: list[int]
) -> None:
    assert alike_rows(rows(*kinds)) == DuplicateRows(first, order)


@pytest.mark.parametrize("kinds", [(1,), (1, 2), (1, 2, 1)])
def test_other_rows_are_none(kinds: tuple[int, ...]) -> None:
    assert alike_rows(rows(*kinds)) is None


def test_rows_with_another_mask_are_not_alike() -> None:
    assert alike_rows(rows(1, 1), torch.tensor([[1, 1, 1], [0, 1, 1]])) is None
