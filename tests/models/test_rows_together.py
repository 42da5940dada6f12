"""A few rows by one weight: together where that is faster, and the same products but for rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from swarmkit.models.kernels import cut_linear, rows_together
from swarmkit.models.kernels.rows_together import cuts_together, multiply_rows

IN, OUT = 512, 768


class Comparisons:
    """Counts comparisons of rows one by one with rows together, and says how long each took."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = [2.0, 1.0]

    def made(self, works: object) -> list[float]:
        self.count += 1
        return self.seconds


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> Iterator[Comparisons]:
    counted = Comparisons()
    monkeypatch.setattr(rows_together, "measured_seconds", counted.made)
    forget()
    yield counted
    forget()


def forget() -> None:
    """Forget what only this process remembers, as if it began."""
    rows_together.cuts_together.cache_clear()
    cut_linear.fastest_cuts.cache_clear()


@pytest.mark.parametrize("cut", [0, 16, 128])
@pytest.mark.parametrize("bias", [None, torch.randn(OUT)], ids=["plain", "bias"])
def test_rows_multiplied_together_are_those_multiplied_one_by_one(
    bias: torch.Tensor | None, cut: int
) -> None:
    rows, weight = torch.randn(5, IN), torch.randn(OUT, IN) / IN**0.5
    alone = torch.cat([functional.linear(row[None], weight, bias) for row in rows])
    assert torch.allclose(multiply_rows(rows, weight, bias, [cut] * 6), alone, rtol=0, atol=1e-5)


def test_a_weight_that_does_not_lie_in_one_piece_is_not_cut() -> None:
    rows, weight = torch.randn(5, IN), torch.randn(IN, OUT).T
    assert torch.equal(multiply_rows(rows, weight, None, [16] * 6), functional.linear(rows, weight))


def test_rows_go_together_where_that_is_faster(comparisons: Comparisons) -> None:
    assert cuts_together(OUT, IN, torch.float32, 1) == cut_linear.fastest_cuts(OUT, IN, 1)


def test_rows_go_one_by_one_where_together_is_not_much_faster(comparisons: Comparisons) -> None:
    comparisons.seconds = [1.1, 1.0]
    assert cuts_together(OUT, IN, torch.bfloat16, 1) is None


def test_only_float32_is_cut(comparisons: Comparisons) -> None:
    assert cuts_together(OUT, IN, torch.bfloat16, 1) == ()


def test_a_small_weight_is_not_even_tried(comparisons: Comparisons) -> None:
    assert cuts_together(16, IN, torch.float32, 1) is None
    assert comparisons.count == 0


def test_a_second_start_does_not_compare_again(comparisons: Comparisons) -> None:
    for _ in range(2):
        cuts_together(OUT, IN, torch.bfloat16, 1)
        forget()
    assert comparisons.count == 1


def test_what_is_measured_is_an_answer() -> None:
    forget()
    assert cuts_together(OUT, IN, torch.float32, 1) in (None, cut_linear.fastest_cuts(OUT, IN, 1))
