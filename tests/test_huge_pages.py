"""Weights in huge pages of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PAGES.exists() or "[madvise]" not in PAGES.read_text(),
        reason="Linux does not leave huge pages to programs here",
    ),
]
PROGRAM = """
from swarmkit.huge_pages import ask_for_huge_pages
ask_for_huge_pages()
import torch
weight = torch.ones(16, 2**20)
[line] = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages:")]
print(int(line.split()[1]) * 1024)
"""


def bytes_in_huge_pages(variable: str | None) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if variable is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = variable
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return int(run.stdout)


def test_a_large_tensor_lies_in_huge_pages_after_they_were_asked_for() -> None:
    assert bytes_in_huge_pages(None) >= 2**25


def test_a_user_who_switched_huge_pages_off_gets_none() -> None:
    assert bytes_in_huge_pages("0") == 0
