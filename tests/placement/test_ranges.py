"""Ranges of blocks: as people write them, and what they leave uncovered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmkit.errors import UsageError
from swarmkit.placement.ranges import parse_blocks, uncovered


@pytest.mark.parametrize(("text", "blocks"), [("4:8", (4, 8)), (":4", (0, 4)), ("4:", (4, 8)), (":", (0, 8))])
def test_ranges_are_read_as_people_write_them(text: str, blocks: tuple[int, int]) -> None:
    assert parse_blocks(text, 8) == blocks


@pytest.mark.parametrize("text", ["", "4", "a:b", "4-8", "4:4", "5:4", "0:9", "-1:2"])
def test_other_texts_are_mistakes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_blocks(text, 8)


@given(
    st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12))),
    st.integers(0, 8),
    st.integers(0, 8),
)
def test_uncovered_is_what_counting_block_by_block_finds(
    ranges: list[tuple[int, int]], start: int, stop: int
) -> None:
    ranges = [(low, high) for low, high in ranges if low < high]
    found = [block for low, high in uncovered(start, stop, ranges) for block in range(low, high)]
    wanted = [b for b in range(start, stop) if not any(low <= b < high for low, high in ranges)]
    assert found == wanted
