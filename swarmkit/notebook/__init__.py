"""Live views for notebooks: a pipeline at work, a swarm, a session's steps, and training.

`pip install "swarmkit-llm[notebook]"` brings what they need. Example::

    from swarmkit.notebook import PipelineView

    PipelineView(model)          # the last line of a cell shows it; it follows every later `generate()`
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarmkit.notebook.answer import BackgroundAnswer, generate_in_background
    from swarmkit.notebook.views import PipelineView, SessionTimeline, SwarmView, TrainingView

_HOMES = {
    "BackgroundAnswer": "swarmkit.notebook.answer",
    "PipelineView": "swarmkit.notebook.views",
    "SessionTimeline": "swarmkit.notebook.views",
    "SwarmView": "swarmkit.notebook.views",
    "TrainingView": "swarmkit.notebook.views",
    "generate_in_background": "swarmkit.notebook.answer",
}

__all__ = [
    "BackgroundAnswer",
    "PipelineView",
    "SessionTimeline",
    "SwarmView",
    "TrainingView",
    "generate_in_background",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
