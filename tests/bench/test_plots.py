"""The picture of goals that `make bench` draws."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plots() -> Iterator[ModuleType]:
    """`benchmarks/plots.py`, which is no part of the package."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import plots

    yield plots
    sys.path.remove(folder)
    del sys.modules["plots"]


PREFILL: dict[str, Any] = {
    "prefill-m": {"results": [{"stages": 2, "ratio_to_local": 1.3}, {"stages": 4, "ratio_to_local": 1.0}]}
}


def bars(picture: str) -> list[float]:
    """The lengths of the bars; the first rectangle is the background."""
    return [float(r.attrib["width"]) for r in xml.fromstring(picture).iter(f"{SVG}rect")][1:]


def test_without_results_there_are_no_goals(plots: ModuleType) -> None:
    assert plots.goals({}) == []


def test_a_result_of_another_benchmark_is_no_goal(plots: ModuleType) -> None:
    assert plots.goals({"precision-tiny-chat": {"anything": 1}}) == []


def test_a_goal_is_read_from_its_result(plots: ModuleType) -> None:
    (goal,) = plots.goals(PREFILL)
    assert (goal.value, goal.target, goal.petals, goal.less_is_better) == (1.3, 0.65, 1.4, True)


@pytest.mark.parametrize(("less_is_better", "value", "score"), [(True, 4.0, 0.5), (False, 4.0, 2.0)])
def test_more_than_1_is_better_than_the_goal(
    plots: ModuleType, less_is_better: bool, value: float, score: float
) -> None:
    assert plots.Goal("x", value, 2.0, less_is_better=less_is_better).score(value) == score


def test_the_picture_has_a_bar_for_each_goal_and_a_ring_where_petals_was_measured(plots: ModuleType) -> None:
    picture = plots.draw([plots.Goal("one", 1, 1), plots.Goal("two & three", 2, 1, petals=1.5)])
    assert len(bars(picture)) == 2
    assert len(list(xml.fromstring(picture).iter(f"{SVG}circle"))) == 1


def test_the_better_has_the_longer_bar(plots: ModuleType) -> None:
    worse, better = bars(plots.draw([plots.Goal("a", 0.5, 1), plots.Goal("b", 2, 1)]))
    assert worse < better


def test_what_is_beyond_the_scale_ends_at_its_edge(plots: ModuleType) -> None:
    edge, beyond = bars(plots.draw([plots.Goal("a", 8, 1), plots.Goal("b", 1000, 1)]))
    assert edge == beyond
