"""The page: a chat, a text that is gone on with, a comparison, the swarm, and how programs do the same."""

from __future__ import annotations

import gradio as gr

from swarmkit.local.swarm import LocalSwarm
from swarmkit_app.playground.answering import Answering
from swarmkit_app.playground.api_tab import add_api_tab
from swarmkit_app.playground.chat_tab import add_chat_tab
from swarmkit_app.playground.compare_tab import add_compare_tab
from swarmkit_app.playground.completion_tab import add_completion_tab
from swarmkit_app.playground.parts import PageParts, session_of
from swarmkit_app.playground.swarm_tab import add_swarm_tab

MOST_TOKENS = 2048


def build_page(
    answering: Answering, swarm: LocalSwarm | None = None, most_tokens: int = MOST_TOKENS
) -> gr.Blocks:
    """Lay out the page.

    Args:
        answering: what answers, by the name of the model.
        swarm: the local swarm that serves the model, whose servers visitors may then kill.
        most_tokens: of an answer.
    """
    first = next(iter(answering.engines))

    async def gone(request: gr.Request) -> None:
        answering.visitors.gone(session_of(request))

    with gr.Blocks(title="swarmkit playground", analytics_enabled=False, fill_width=True) as page:
        turn = gr.Number(0, precision=0, visible=False)
        parts = PageParts(dict(answering.engines), answering, swarm, most_tokens, turn)
        gr.Markdown(f"# swarmkit playground\n{_introduction(first, swarm)}")
        with gr.Tab("Chat"):
            chat = add_chat_tab(page, parts)
        with gr.Tab("Completion"):
            add_completion_tab(parts)
        with gr.Tab("Compare"):
            add_compare_tab(parts)
        with gr.Tab("Swarm"):
            add_swarm_tab(page, parts, chat.model)
        with gr.Tab("API") as api:
            add_api_tab(api, chat, first)
        page.unload(gone)
    return page


def _introduction(name: str, swarm: LocalSwarm | None) -> str:
    where = (
        f"`{name}` runs on {len(swarm.servers)} servers on this machine. Kill one while it answers."
        if swarm is not None
        else f"`{name}` runs on the servers of a swarm, which see the hidden states of what you write."
    )
    return f"{where} Conversations are kept in this browser, and nowhere else."
