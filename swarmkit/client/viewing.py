"""Who shows an answer while it comes, for `generate(view=…)`: a room above offers itself here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ShowAnswer = Callable[[Any, dict[str, Any], Any], Any]
"""Called with the model, the arguments of `generate()` by name, and `view`; returns what that returns."""

_offers: list[Callable[[], ShowAnswer]] = []


def offer(load: Callable[[], ShowAnswer]) -> None:
    """Show answers from now on.

    Args: load: imports what shows them; called when the first one is to be shown.
    """
    _offers[:] = [load]


def show(model: Any, arguments: dict[str, Any], view: Any) -> Any:
    """Generate an answer, and show it while it comes.

    Raises:
        UsageError: what shows answers is not installed.
    """
    return _offers[0]()(model, arguments, view)
