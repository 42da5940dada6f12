"""What `docs/security.md` claims is shown by tests that exist, and by results that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "tests/" in line
]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", PAGE)))


def test_the_page_has_its_table() -> None:
    assert len(ROWS) > 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_each_line_names_its_test(row: list[str]) -> None:
    assert re.search(r"`tests/[\w/]+\.py(::test_\w+)?`", row[-1])


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_is_named_exists(named: str) -> None:
    path, _, function = named.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert not function or function in functions


@pytest.mark.parametrize("result", sorted(set(re.findall(r"\]\(\.\./(benchmarks/results/[^)]+)\)", PAGE))))
def test_a_result_that_is_quoted_is_there(result: str) -> None:
    assert (ROOT / result).is_file()
