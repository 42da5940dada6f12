"""Kernels are compared once on a machine; a later start takes what was remembered, and checks products."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import platformdirs
import pytest
import torch

from swarmkit.models.kernels import blocked_linear, choices, few_rows

IN, OUT = 512, 768

try:
    torch.ops.mkldnn._reorder_linear_weight(torch.randn(8, 8), 1)
except (AttributeError, RuntimeError):
    pytest.skip("this torch has no blocked weights", allow_module_level=True)


class Comparisons:
    """Counts comparisons; in all of them the last kernel is the fastest."""

    def __init__(self) -> None:
        self.blocked = 0
        self.ways = 0

    def of_blocked(self, works: Sequence[Callable[[], object]], trials: int = 1) -> list[float]:
        self.blocked += 1
        return [2.0, 1.0]

    def of_ways(self, works: Sequence[Callable[[], object]]) -> list[float]:
        self.ways += 1
        return [1.0 / number for number in range(1, len(works) + 1)]


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> Iterator[Comparisons]:
    counted = Comparisons()
    monkeypatch.setattr(blocked_linear, "measured_seconds", counted.of_blocked)
    monkeypatch.setattr(few_rows, "measured_seconds", counted.of_ways)
    forget()
    yield counted
    forget()


def forget() -> None:
    """Forget what only this process remembers, as if it began."""
    blocked_linear.is_faster.cache_clear()
    few_rows.fastest_ways.cache_clear()
    choices.processor.cache_clear()


def start(threads: int = 1) -> tuple[bool, Sequence[int]]:
    """What a process that begins chooses for one shape."""
    forget()
    return (
        blocked_linear.is_faster(OUT, IN, torch.float32, threads),
        few_rows.fastest_ways(OUT, IN, torch.float32, threads),
    )


def choices_file() -> Path:
    return Path(platformdirs.user_cache_dir("swarmkit")) / "kernels.json"


def replace_choices(with_value: object) -> None:
    """Have another value stand for every choice."""
    found = json.loads(choices_file().read_text())
    choices_file().write_text(json.dumps(dict.fromkeys(found, with_value)))


def test_a_second_start_does_not_compare_again(comparisons: Comparisons) -> None:
    start()
    compared = comparisons.blocked, comparisons.ways
    start()
    assert (comparisons.blocked, comparisons.ways) == compared != (0, 0)


def test_a_second_start_chooses_as_the_first(comparisons: Comparisons) -> None:
    assert start() == start()


def test_a_second_start_checks_products_of_what_it_is_to_use(
    comparisons: Comparisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start()[0]
    product = few_rows.onednn_product
    monkeypatch.setattr(blocked_linear, "onednn_product", lambda *given: product(*given) + 0.01)
    assert not start()[0]


def test_products_that_are_others_are_not_remembered(
    comparisons: Comparisons, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(blocked_linear, "onednn_product", lambda *given: torch.zeros(()))
        start()
    assert start()[0]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\x00"], ids=lambda text: repr(text[:3])
)
def test_with_a_damaged_file_it_is_compared_again(comparisons: Comparisons, content: str) -> None:
    first = start()
    compared = comparisons.ways
    choices_file().write_text(content)
    assert start() == first
    assert comparisons.ways == 2 * compared


@pytest.mark.parametrize(
    "foreign",
    [
        *(None, 7, "yes", [], ["plain"] * 49, {"a": 1}),
        *(["plain"] + [other] * 49 for other in ("another", "cut 64", 16, True, None, ["plain"])),
    ],
    ids=str,
)
def test_what_is_no_choice_is_compared_again(comparisons: Comparisons, foreign: object) -> None:
    first = start()
    compared = comparisons.blocked, comparisons.ways
    replace_choices(foreign)
    assert start() == first
    assert (comparisons.blocked, comparisons.ways) == (2 * compared[0], 2 * compared[1])


def another_processor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(choices, "processor", lambda: "another")


def another_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "__version__", "99.0")
    choices.build.cache_clear()


def another_instruction_set(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")


def another_version_of_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(choices, "__version__", "99.0")


def another_comparison(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(few_rows, "COMPARISON", 99)


@pytest.mark.parametrize(
    "change",
    [
        another_processor,
        another_torch,
        another_instruction_set,
        another_version_of_ours,
        another_comparison,
    ],
)
def test_in_other_circumstances_it_is_compared_again(
    comparisons: Comparisons, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    start()
    compared = comparisons.ways
    with monkeypatch.context() as patch:
        change(patch)
        few_rows.fastest_ways.cache_clear()
        few_rows.fastest_ways(OUT, IN, torch.float32, 1)
    assert comparisons.ways == 2 * compared


def test_with_other_threads_it_is_compared_again(comparisons: Comparisons) -> None:
    start(threads=1)
    compared = comparisons.blocked
    start(threads=2)
    assert comparisons.blocked == 2 * compared


def test_where_nothing_can_be_remembered_it_is_compared_each_time(
    comparisons: Comparisons, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "a file"))
    first = start()
    compared = comparisons.ways
    assert start() == first
    assert comparisons.ways == 2 * compared
