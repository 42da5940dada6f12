"""The tab that goes on with a text, each token coloured by how likely the model found it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import gradio as gr

from swarmkit.api.engine import AnswerEngine
from swarmkit.client.token_chances import TokenRecord
from swarmkit.drawing.tokens import TokenPicture, tokens_html
from swarmkit_app.playground.conversation import completion_request
from swarmkit_app.playground.parts import ANSWERING, PageParts, add_stop, counted, session_of
from swarmkit_app.playground.settings_panel import add_settings, options_of

_PART = "completion"
_EXPLAINED = """
The model goes on with the text as it is, special tokens and all. Tokens that it found unlikely stand on amber
(below 50 %) or red (below 10 %). Rest the pointer on one, or open the list, to see what it found likelier.
"""


def add_completion_tab(parts: PageParts) -> None:
    """Lay the tab out where the page is being built."""

    async def answer(
        request: gr.Request, turn: float, text: str, name: str, *settings: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        if not text:
            yield gr.skip(), "Write a text first."
            return
        make = partial(completion_request, text=text, options=options_of("", *settings))
        told = parts.answering.answer(session_of(request), counted(request), _PART, name, make, int(turn))
        async for progress in told:
            if not progress.is_wanted:
                yield gr.skip(), gr.skip()
                return
            yield _framed(tokens_html(text, [_picture(each) for each in progress.tokens])), progress.summary

    gr.Markdown(_EXPLAINED)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            text = gr.Textbox(beginning(parts.engines[parts.names[0]]), label="Text", lines=4)
            with gr.Row():
                go = gr.Button("Go on", variant="primary", size="md", min_width=80)
                add_stop(parts, _PART)
            with gr.Accordion("Settings", open=False):
                model = gr.Dropdown(parts.names, value=parts.names[0], label="Model")
                settings = add_settings(parts.most_tokens)
        with gr.Column(scale=4, min_width=320):
            shown = gr.HTML(_framed(""), label="Text with its continuation")
            summary = gr.Markdown("No text yet.", elem_classes="sk-summary")
    gr.on([go.click], answer, [parts.turn, text, model, *settings.inputs], [shown, summary], **ANSWERING)


def beginning(engine: AnswerEngine) -> str:
    """A text to begin with: for a model that was taught to chat, a question in its own template."""
    tokenizer = engine.tokenizer
    if not tokenizer.chat_template:
        return "One morning"
    asked = [{"role": "user", "content": "Tell me a story about a fox."}]
    return str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))


def _picture(record: TokenRecord) -> TokenPicture:
    others = [(each.text, each.logprob) for each in record.likeliest]
    return TokenPicture(record.chosen.text, record.chosen.logprob, others)


def _framed(content: str) -> str:
    return f'<div class="sk-tokens" tabindex="0" role="region" aria-label="Continued text">{content}</div>'
