"""The files that a decode token passes through are few, and the page about the architecture lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .models.tiny import make_checkpoint
from .record_hot_path import files_of_a_token

ROOT = Path(__file__).parents[1]
SECTION = "## Files of a decode token"
MOST_FILES = 35
MOST_CORE_LINES = 3200


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """The numbered lines of the section."""
    section = (ROOT / "docs" / "architecture.md").read_text().split(f"{SECTION}\n")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. .*$", section, flags=re.MULTILINE)


def file_of(line: str) -> str:
    """The path that a line begins with."""
    found = re.match(r"\d+\. \**`([^`]+)`", line)
    assert found, line
    return found[1]


def test_a_decode_token_passes_through_the_files_that_are_listed(lines: list[str], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", max_position_embeddings=64)
    assert sorted(files_of_a_token(checkpoint)) == sorted(map(file_of, lines))


def test_the_files_of_a_decode_token_become_no_more(lines: list[str]) -> None:
    assert len(lines) <= MOST_FILES


def test_the_core_is_ten_files_that_can_be_read_before_lunch(lines: list[str]) -> None:
    core = [file_of(line) for line in lines if line.split(" ")[1].startswith("**")]
    sizes = {file: len((ROOT / file).read_text().splitlines()) for file in core}
    assert len(core) == 10
    assert sum(sizes.values()) <= MOST_CORE_LINES, sizes
