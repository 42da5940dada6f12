"""What compiled products of one row brought on this machine is remembered."""

from __future__ import annotations

import pytest
import torch

from swarmkit.models.kernels.compiled_products import may_be_faster, remember_faster

IN, OUT = 512, 768
SHAPE = torch.Size([OUT, IN])


def test_what_was_not_tried_may_be_faster() -> None:
    assert may_be_faster(SHAPE, torch.float32, 1)


@pytest.mark.parametrize("faster", [True, False])
def test_what_was_tried_is_remembered(faster: bool) -> None:
    remember_faster(SHAPE, torch.float32, 1, faster)
    assert may_be_faster(SHAPE, torch.float32, 1) == faster


@pytest.mark.parametrize(
    ("shape", "dtype", "threads"),
    [((IN, OUT), torch.float32, 1), (SHAPE, torch.bfloat16, 1), (SHAPE, torch.float32, 2)],
)
def test_it_counts_for_nothing_else(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    remember_faster(SHAPE, torch.float32, 1, False)
    assert may_be_faster(torch.Size(shape), dtype, threads)
