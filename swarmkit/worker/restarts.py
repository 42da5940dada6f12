"""How long to wait before a node process that has failed is started again. Pure."""

from __future__ import annotations

MANY_FAILURES = 5
"""After so many in a row the person is told."""
_FIRST_S, _LONGEST_S = 2.0, 600.0
SETTLED_S = 120.0
"""A node that has served for so long has not failed in a row with those before it."""


def pause_before_restart(failures: int) -> float:
    """Return seconds: 2, 4, 8, … up to ten minutes.

    Args: failures: in a row, at least 1.
    """
    return min(_FIRST_S * 2.0 ** (min(failures, 20) - 1), _LONGEST_S)
