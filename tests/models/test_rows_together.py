"""A few rows by one weight: together where that is faster, and the same products but for rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from swarmkit.models.kernels import few_rows, rows_together
from swarmkit.models.kernels.rows_together import ways_together

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
    rows_together.ways_together.cache_clear()
    few_rows.fastest_ways.cache_clear()


def test_rows_go_together_where_that_is_faster(comparisons: Comparisons) -> None:
    assert ways_together(OUT, IN, torch.float32, 1) == few_rows.fastest_ways(OUT, IN, torch.float32, 1)


def test_rows_go_one_by_one_where_together_is_not_much_faster(comparisons: Comparisons) -> None:
    comparisons.seconds = [1.1, 1.0]
    assert ways_together(OUT, IN, torch.bfloat16, 1) is None


def test_another_dtype_than_float32_is_multiplied_plainly(comparisons: Comparisons) -> None:
    assert ways_together(OUT, IN, torch.bfloat16, 1) == ()
    assert few_rows.fastest_ways(OUT, IN, torch.bfloat16, 1) == ()


def test_a_small_weight_is_not_even_tried(comparisons: Comparisons) -> None:
    assert ways_together(16, IN, torch.float32, 1) is None
    assert few_rows.fastest_ways(16, IN, torch.float32, 1) == ()
    assert comparisons.count == 0


def test_a_second_start_does_not_compare_again(comparisons: Comparisons) -> None:
    for _ in range(2):
        ways_together(OUT, IN, torch.bfloat16, 1)
        forget()
    assert comparisons.count == 1


def test_what_is_measured_is_an_answer() -> None:
    forget()
    assert ways_together(OUT, IN, torch.float32, 1) in (
        None,
        few_rows.fastest_ways(OUT, IN, torch.float32, 1),
    )
