"""The tab with all models of the swarm, their servers, and what would break if one of these left."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import gradio as gr

from swarmkit.client.fresh_status import FreshStatus
from swarmkit.client.overview import status_pictures, status_rows
from swarmkit.client.status import ModelStatus
from swarmkit.drawing.bundle import table
from swarmkit.drawing.swarm import swarm_svg
from swarmkit.errors import SwarmkitError
from swarmkit_app.playground.parts import QUICK, PageParts
from swarmkit_app.playground.style import scrolling

_EVERY_S = 2.0
_MOST_MODELS = 8


def add_swarm_tab(page: gr.Blocks, parts: PageParts, model: gr.Dropdown) -> None:
    """Lay the tab out where the page is being built.

    Args: model: the model that is chosen, which is shown first.
    """
    fresh = {name: FreshStatus(engine.model.connection, _EVERY_S) for name, engine in parts.engines.items()}

    async def overview(name: str) -> str:
        try:
            return swarm_html(await fresh[name].get(), name)
        except SwarmkitError as error:
            return scrolling(f"<p>⚠ {escape(str(error))}</p>", "Swarm")

    everything = gr.HTML(scrolling("<p>Looking …</p>", "Swarm"), elem_classes="sk-picture")
    gr.Markdown(
        "`swarmkit status --watch` shows the same on a terminal, and `/swarm.json` of the API to programs."
    )
    page.load(overview, model, everything, **QUICK)
    clock = gr.Timer(_EVERY_S)
    clock.tick(overview, model, everything, show_progress="hidden", concurrency_limit=4)


def swarm_html(models: Sequence[ModelStatus], first: str) -> str:
    """The models of a swarm as HTML, the one that is named `first` in front."""
    ordered = sorted(models, key=lambda model: model.model != first)
    parts = [_model_html(model) for model in ordered[:_MOST_MODELS]]
    if len(ordered) > _MOST_MODELS:
        parts.append(f"<p>and {len(ordered) - _MOST_MODELS} more models</p>")
    return scrolling("".join(parts) or "<p>No server offers a model here yet.</p>", "Swarm")


def _model_html(model: ModelStatus) -> str:
    drawing = swarm_svg(model.model, model.num_blocks, status_pictures(model))
    return f"<section>{drawing}{table(status_rows(model))}</section>"
