"""Sizes are read and written as people do it."""

from __future__ import annotations

import pytest

from swarmkit.errors import UsageError
from swarmkit.sizes import format_bytes, format_data, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"), [("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("1.5mib", 3 * 2**19), ("7", 7)]
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "3 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**40, "1024.0 GiB")]
)
def test_memory_is_written_in_powers_of_two(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (5e10, "50.0 GB"), (2e12, "2.0 TB")],
)
def test_data_is_written_in_powers_of_ten(count: float, text: str) -> None:
    assert format_data(count) == text
