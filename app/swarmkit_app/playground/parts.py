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

ANSWERING: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "trigger_mode": "multiple",
    "js": "(...args) => swarmkit.ask(args, false)",
}
"""Options of events that answer, whose first input is the turn.

The page's own line bounds how many run, and tells each its place. By default, gradio drops a click without a
word while the event that it caused before is still under way in the browser; here the new one takes over.
"""

NEW_VERSION = {**ANSWERING, "js": "(...args) => swarmkit.ask(args, true)"}
"""The same where the conversation goes on differently than it did."""

_NOW = "() => [swarmkit.now()]"


@dataclass(frozen=True)
class PageParts:
    """What a tab is built from.

    Attributes:
        swarm: the local swarm that serves the model, whose servers visitors may then kill.
        most_tokens: of an answer.
        turn: which click of the window asks for an answer; the page fills it in as it sends the event.
    """

    engines: dict[str, AnswerEngine]
    answering: Answering
    swarm: LocalSwarm | None
    most_tokens: int
    turn: gr.Number

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


def add_stop(parts: PageParts, *shown: str) -> gr.Button:
    """A button that ends the visitor's own answers in parts of the page; the Escape key presses it, too."""

    async def stop(request: gr.Request, turn: float) -> None:
        for each in shown:
            parts.answering.visitors.stop(session_of(request), each, int(turn))

    halt = gr.Button("Stop", variant="stop", size="md", min_width=80, elem_classes="sk-stop")
    halt.click(stop, parts.turn, None, js=_NOW, trigger_mode="multiple", **QUICK)
    return halt


def clearing(parts: PageParts, part: str) -> dict[str, Any]:
    """An event that ends the answer in a part of the page, of which nothing more is shown afterwards.

    It goes through gradio's queue, as answers do: what has been told of the answer comes before its end.
    """

    async def clear(request: gr.Request, turn: float) -> None:
        await parts.answering.visitors.clear(session_of(request), part, int(turn))

    return {"fn": clear, "inputs": parts.turn, "outputs": None, **ANSWERING, "js": "() => swarmkit.leave()"}


def idle_picture(engine: AnswerEngine) -> str:
    """The servers of a model before there is an answer."""
    client = engine.model.connection.client
    servers = server_pictures(client.known.servers())
    picture = PipelinePicture(client.model.name, client.model.num_blocks, servers=servers)
    return scrolling(pipeline_svg(picture))


def health(engine: AnswerEngine) -> str:
    """Whether a model can answer now, in one sentence."""
    client = engine.model.connection.client
    missing = client.known.unserved(0, client.model.num_blocks)
    if missing:
        named = ", ".join(f"{low}:{high}" for low, high in missing)
        return f"⚠ No server has the blocks {named}: this model cannot answer until one joins."
    least = min(coverage(client.model.num_blocks, server_pictures(client.known.servers())), default=0)
    enough = "one server at least" if least == 1 else f"{least} servers at least"
    return f"Every block of this model has {enough}."
