"""How times become numbers."""

from __future__ import annotations

import pytest
import torch

from swarmkit.bench.clients import shares
from swarmkit.bench.decode import DecodeResult, fit_beyond_local
from swarmkit.bench.distance import chain_bound, relayed_bound
from swarmkit.bench.load import Steps, together
from swarmkit.bench.measure import (
    Generated,
    fit_line,
    median_ratio,
    must_be_equal,
    percentile,
    random_prompt,
)

# lines, percentiles, ratios


def test_a_line_through_points_on_a_line_is_that_line() -> None:
    assert fit_line([(1, 5.0), (2, 7.0), (4, 11.0)]) == pytest.approx((3.0, 2.0))


def test_a_line_through_scattered_points_has_the_least_squares() -> None:
    assert fit_line([(0, 0.0), (1, 2.0), (2, 1.0)]) == pytest.approx((0.5, 0.5))


def test_points_above_one_another_have_no_line() -> None:
    assert fit_line([(2, 1.0), (2, 3.0)]) is None


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100)])
def test_a_percentile_is_the_value_that_so_many_do_not_exceed(share: float, value: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == value


def test_the_percentile_of_few_values_is_the_largest() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0


def test_ratios_are_taken_within_rounds() -> None:
    assert median_ratio([10, 2, 30], [10, 1, 10]) == 2


# what was generated


def generated(*stamps: float, began: float = 0.0) -> Generated:
    return Generated(torch.zeros(1, 1), began, stamps)


def test_the_first_token_is_the_second_stamp_because_the_prompt_is_the_first() -> None:
    assert generated(1.1, 3.0, 3.5, began=1.0).first_token_s == 2.0


def test_a_tokens_time_does_not_count_the_first_one() -> None:
    assert generated(0.0, 9.0, 9.001, 9.003, 9.006).ms_per_token == pytest.approx(2.0)


def test_other_tokens_are_an_error_in_float32_only() -> None:
    one, other = torch.tensor([1]), torch.tensor([2])
    assert must_be_equal(one, other, "bfloat16") is False
    with pytest.raises(AssertionError, match="differ"):
        must_be_equal(one, other, "float32")


def test_a_prompt_has_no_special_tokens_and_comes_again_with_its_seed() -> None:
    prompt = random_prompt(10, 500, seed=1)
    assert (int(prompt.min()), int(prompt.max())) == (3, 9)
    assert torch.equal(prompt, random_prompt(10, 500, seed=1))
    assert not torch.equal(prompt, random_prompt(10, 500, seed=2))


# what clients did


def steps(*spans: tuple[float, float], cpu_s: float = 0.0) -> Steps:
    return Steps(spans, cpu_s)


def test_steps_last_from_the_first_beginning_to_the_last_end() -> None:
    assert steps((2.0, 5.0), (1.0, 3.0)).seconds == 4.0


def test_what_processes_did_together_is_all_of_it() -> None:
    assert together([steps((0, 1), cpu_s=1), steps((5, 7), cpu_s=2)]) == steps((0, 1), (5, 7), cpu_s=3)


def test_beside_are_the_steps_that_overlap() -> None:
    found = steps((0, 1), (1, 3), (4, 5), (5.5, 9), (9, 10)).beside(2, 6)
    assert found.spans == ((1, 3), (4, 5), (5.5, 9))


@pytest.mark.parametrize(
    ("count", "processes", "each"), [(1, 2, [1, 0]), (8, 2, [4, 4]), (32, 3, [11, 11, 10])]
)
def test_clients_are_shared_among_processes(count: int, processes: int, each: list[int]) -> None:
    assert shares(count, processes) == each


# what is reported


def chain_of(stages: int, added_ms: float) -> DecodeResult:
    return DecodeResult(stages, 0, 0, added_ms, 0, 0, 0, 0, 0, 0, 0)


def test_the_time_beyond_local_is_a_base_and_a_part_per_server() -> None:
    found = fit_beyond_local([chain_of(1, 3.5), chain_of(2, 5.0), chain_of(4, 8.0)])
    assert found == {"base_ms": 2.0, "per_server_ms": 1.5}


def test_one_chain_length_has_no_fit() -> None:
    assert fit_beyond_local([chain_of(2, 5.0)]) is None


def test_a_chain_crosses_one_way_more_than_it_has_servers() -> None:
    assert chain_bound(stages=3, one_way_s=0.05, compute_s=0.05) == pytest.approx(1 / 0.25)


def test_a_relayed_step_goes_to_each_server_and_back() -> None:
    assert relayed_bound(stages=3, one_way_s=0.05, compute_s=0.1) == pytest.approx(1 / 0.4)
