"""Weights in huge pages, where the system leaves the choice to its programs.

A token on a CPU reads every weight of a stage once. In pages of 4 KiB, finding them in memory takes a
measurable part of that time; Linux can keep large pieces of memory in pages of 2 MiB. On most distributions
it does so only for programs that ask.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_VARIABLE = "THP_MEM_ALLOC_ENABLE"


def ask_for_huge_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch ask for huge pages for tensors of 2 MiB and more; what the user has set stays.

    torch reads the variable when it allocates its first tensor, so this must be called before torch is
    imported. Tensors are not rounded up: what does not fill a huge page lies in small ones.
    """
    environment.setdefault(_VARIABLE, "1")
