"""When a server has measured enough steps of its own to know how long one takes."""

from __future__ import annotations

import pytest

from swarmkit.server.engine.throughput import typical_step_s


@pytest.mark.parametrize("seconds", [[], [1.0], [1.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.2, 1.0, 1.2]], ids=str)
def test_more_steps_are_needed_until_three_in_a_row_are_alike(seconds: list[float]) -> None:
    assert typical_step_s(seconds) is None


@pytest.mark.parametrize(
    ("seconds", "typical"),
    [([1.0, 1.01, 1.02], 1.01), ([9.0, 2.0, 1.0, 1.02, 1.01], 1.01), ([0.0, 0.0, 0.0], 0.0)],
    ids=str,
)
def test_three_steps_that_are_alike_tell_how_long_one_takes(seconds: list[float], typical: float) -> None:
    assert typical_step_s(seconds) == typical


def test_on_a_busy_machine_it_is_the_median_of_all_but_the_first_steps() -> None:
    assert typical_step_s([50.0, 40.0, 1.0, 6.0, 2.0, 5.0, 3.0, 9.0]) == 4.0
