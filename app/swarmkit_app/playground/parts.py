"""What the tabs of the page have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from swarmkit.api.engine import AnswerEngine
from swarmkit.client.pictures import server_pictures
from swarmkit.drawing.pipeline import pipeline_svg
from swarmkit.drawing.swarm import coverage
from swarmkit.drawing.values import PipelinePicture
from swarmkit.local.swarm import LocalSwarm
from swarmkit_app.playground.answering import Answering
from swarmkit_app.playground.style import scrolling
from swarmkit_app.playground.visitors import counted_as

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
"""Options of events that need no turn."""

ANSWERING: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
"""Options of events that answer: the page's own line bounds how many run, and tells each its place."""


@dataclass(frozen=True)
class PageParts:
    """What a tab is built from.

    Attributes:
        swarm: the local swarm that serves the model, whose servers visitors may then kill.
        most_tokens: of an answer.
    """

    engines: dict[str, AnswerEngine]
    answering: Answering
    swarm: LocalSwarm | None
    most_tokens: int

    @property
    def names(self) -> list[str]:
        """The models, the one that is chosen at first in front."""
        return list(self.engines)


def session_of(request: gr.Request) -> str:
    """Names the window of a visitor."""
    return str(request.session_hash)


def counted(request: gr.Request) -> str:
    """Whose allowance an answer counts for."""
    client = request.client
    return counted_as(session_of(request), None if client is None else client.host, request.username)


def add_stop(parts: PageParts, part: str | None = None) -> gr.Button:
    """A button that ends the visitor's own answers in a part of the page; the Escape key presses it, too."""
    halt = gr.Button("Stop", variant="stop", size="md", min_width=80, elem_classes="sk-stop")
    halt.click(stopper(parts, part), **QUICK)
    return halt


def stopper(parts: PageParts, part: str | None = None) -> Any:
    """The function behind such a button; it runs on the page's event loop, as answers do."""

    async def stop(request: gr.Request) -> None:
        for each in (part,) if part is None else part.split():
            parts.answering.visitors.stop(session_of(request), each)

    return stop


def idle_picture(engine: AnswerEngine) -> str:
    """The servers of a model before there is an answer."""
    client = engine.model.connection.client
    servers = server_pictures(client.servers())
    picture = PipelinePicture(client.model.name, client.model.num_blocks, servers=servers)
    return scrolling(pipeline_svg(picture))


def health(engine: AnswerEngine) -> str:
    """Whether a model can answer now, in one sentence."""
    client = engine.model.connection.client
    missing = client.unserved(0, client.model.num_blocks)
    if missing:
        named = ", ".join(f"{low}:{high}" for low, high in missing)
        return f"⚠ No server has the blocks {named}: this model cannot answer until one joins."
    least = min(coverage(client.model.num_blocks, server_pictures(client.servers())), default=0)
    enough = "one server at least" if least == 1 else f"{least} servers at least"
    return f"Every block of this model has {enough}."
