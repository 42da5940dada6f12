"""The tab that puts one question twice, with two models or settings, side by side."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import gradio as gr

from swarmkit_app.playground.conversation import ChatOptions, chat_request
from swarmkit_app.playground.parts import ANSWERING, PageParts, add_stop, counted, session_of

_SIDES = ("left", "right")


def add_compare_tab(parts: PageParts) -> None:
    """Lay the tab out where the page is being built."""

    def answer_on(side: str) -> Any:
        async def answer(
            request: gr.Request, text: str, length: float, name: str, *settings: Any
        ) -> AsyncGenerator[tuple[Any, ...], None]:
            if not text.strip():
                yield gr.skip(), "Write a question first."
                return
            asked = [{"role": "user", "content": text}]
            make = partial(chat_request, history=asked, options=_options(int(length), *settings))
            told = parts.answering.answer(session_of(request), counted(request), side, name, make)
            async for progress in told:
                yield progress.text, progress.summary

        return answer

    text = gr.Textbox(label="Question", placeholder="Ask both", lines=2)
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", size="md", min_width=80)
        add_stop(parts, " ".join(_SIDES))
        length = gr.Slider(
            1, parts.most_tokens, min(200, parts.most_tokens), step=1, label="Longest answer, in tokens"
        )
    with gr.Row(equal_height=False):
        for side, temperature in zip(_SIDES, (0.0, 0.9), strict=True):
            with gr.Column(min_width=300):
                shown = gr.Textbox(
                    label=f"Answer on the {side}", lines=6, interactive=False, elem_classes="sk-answer"
                )
                summary = gr.Markdown("No answer yet.", elem_classes="sk-summary")
                inputs = [
                    gr.Dropdown(parts.names, value=parts.names[0], label=f"Model on the {side}"),
                    gr.Textbox("", label=f"System prompt on the {side}"),
                    gr.Slider(0, 2, temperature, step=0.05, label=f"Temperature on the {side}"),
                    gr.Slider(0.05, 1, 1, step=0.05, label=f"Top p on the {side}"),
                    gr.Number(0, label=f"Seed on the {side}", precision=0),
                ]
            # One event for each side: both run at once, and each has its own place in the line.
            gr.on(
                [ask.click, text.submit],
                answer_on(side),
                [text, length, *inputs],
                [shown, summary],
                **ANSWERING,
            )


def _options(length: int, system: str, temperature: float, top_p: float, seed: float | None) -> ChatOptions:
    return ChatOptions(system or "", temperature, top_p, length, -1 if seed is None else int(seed))
