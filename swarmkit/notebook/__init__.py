"""Live views for notebooks: a pipeline at work, a swarm, a session's steps, and training.

`pip install "swarmkit-llm[notebook]"` brings what they need. Example::

    from swarmkit.notebook import PipelineView

    PipelineView(model)          # the last line of a cell shows it; it follows every later `generate()`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarmkit.lazy import lazy_names

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

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
