"""The tab with the conversation, and its way through the swarm beside it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from swarmkit.drawing.swarm import least_covered
from swarmkit.local.swarm import LocalSwarm
from swarmkit_app.playground.conversation import Message, chat_request, edited, plain, text_of, until_user
from swarmkit_app.playground.parts import (
    ANSWERING,
    QUICK,
    PageParts,
    add_stop,
    counted,
    health,
    idle_picture,
    session_of,
    stopper,
)
from swarmkit_app.playground.settings_panel import SettingsPanel, add_settings, options_of
from swarmkit_app.playground.style import scrolling

_PART = "chat"


@dataclass(frozen=True)
class ChatTab:
    """The components that other tabs read."""

    model: gr.Dropdown
    system: gr.Textbox
    settings: SettingsPanel


def add_chat_tab(page: gr.Blocks, parts: PageParts) -> ChatTab:
    """Lay the tab out where the page is being built."""
    engines, swarm = parts.engines, parts.swarm
    first = parts.names[0]

    async def answer(
        request: gr.Request, history: list[Message], name: str, system: str, *settings: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        history = plain(history)
        if not history or not text_of(history[-1]).strip():
            yield history, gr.skip(), gr.skip()
            return
        # A message of the model at the end is gone on with.
        begun = text_of(history[-1]) if history[-1]["role"] == "assistant" else ""
        before = history[:-1] if begun else history
        make = partial(chat_request, history=history, options=options_of(system, *settings))
        told = parts.answering.answer(session_of(request), counted(request), _PART, name, make)
        async for progress in told:
            text = begun + progress.text
            reply = [{"role": "assistant", "content": text}] if text else []
            drawing = gr.skip() if progress.drawing is None else scrolling(progress.drawing)
            yield [*before, *reply], drawing, progress.summary

    def said(history: list[Message], text: str) -> tuple[list[Message], str]:
        if not text.strip():
            return plain(history), text
        return [*plain(history), {"role": "user", "content": text}], ""

    def again(history: list[Message]) -> list[Message]:
        return until_user(history, len(history))

    def retried(history: list[Message], data: gr.RetryData) -> list[Message]:
        return until_user(history, _index(data))

    def changed(history: list[Message], data: gr.EditData) -> list[Message]:
        return edited(history, _index(data), str(data.value))

    def chosen(name: str) -> tuple[str, str]:
        return idle_picture(engines[name]), health(engines[name])

    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            chat = gr.Chatbot(label="Conversation", editable="user", buttons=["copy", "copy_all"], height=430)
            box = gr.Textbox(label="Message", placeholder="Ask something", autofocus=True, lines=1)
            with gr.Row(elem_classes="sk-actions"):
                send = gr.Button("Send", variant="primary", size="md", min_width=80)
                add_stop(parts, _PART)
                redo = gr.Button("Regenerate", size="md", min_width=90)
                more = gr.Button("Continue", size="md", min_width=80)
                new = gr.Button("New chat", size="md", min_width=80)
        with gr.Column(scale=4, min_width=320):
            picture = gr.HTML(idle_picture(engines[first]), elem_classes="sk-picture", label="Pipeline")
            summary = gr.Markdown("No answer yet.", elem_classes="sk-summary")
            if swarm is not None:
                with gr.Row():
                    victim = gr.Dropdown(_alive(swarm), label="Server", scale=2, min_width=160)
                    kill = gr.Button("Kill this server", variant="stop", min_width=120)
                    add = gr.Button("Add a server", min_width=120)
            with gr.Accordion("Settings", open=False):
                model = gr.Dropdown(parts.names, value=first, label="Model")
                able = gr.Markdown(health(engines[first]))
                system = gr.Textbox("", label="System prompt", lines=2)
                settings = add_settings(parts.most_tokens)

    inputs = [chat, model, system, *settings.inputs]
    outputs = [chat, picture, summary]
    stop = stopper(parts, _PART)
    answered = partial(_then_answer, answer, inputs, outputs)
    answered(gr.on([box.submit, send.click], said, [chat, box], [chat, box], **QUICK))
    answered(redo.click(stop, **QUICK).then(again, chat, chat, **QUICK))
    answered(more.click(stop, **QUICK))
    answered(chat.retry(retried, chat, chat, **QUICK))
    answered(chat.edit(changed, chat, chat, **QUICK))
    new.click(stop, **QUICK).then(list, None, chat, **QUICK)
    model.change(chosen, model, [picture, able], **QUICK)
    page.load(chosen, model, [picture, able], **QUICK)
    if swarm is not None:
        _add_kills(page, swarm, victim, kill, add)
    return ChatTab(model, system, settings)


def _then_answer(answer: Any, inputs: list[Any], outputs: list[Any], event: Any) -> None:
    event.then(answer, inputs, outputs, **ANSWERING)


def _add_kills(
    page: gr.Blocks, swarm: LocalSwarm, victim: gr.Dropdown, kill: gr.Button, add: gr.Button
) -> None:
    """Let visitors end servers of a local swarm, and add some."""

    def end_server(label: str | None) -> Any:
        for number, server in enumerate(swarm.servers):
            if label is not None and label.startswith(f"server-{number} ") and server.alive:
                server.kill()
        return _choice(swarm)

    def add_server() -> Any:
        swarm.add_server(least_covered(swarm.checkpoint.num_blocks, swarm.pictures()))
        return _choice(swarm)

    def refresh() -> Any:
        return _choice(swarm)

    page.load(refresh, None, victim, **QUICK)
    kill.click(end_server, victim, victim, show_progress="hidden")
    add.click(add_server, None, victim, show_progress="minimal")


def _alive(swarm: LocalSwarm) -> list[str]:
    return [f"{each.label} [{each.blocks}]" for each in swarm.pictures() if each.state == "online"]


def _choice(swarm: LocalSwarm) -> Any:
    """The servers that can be killed, the first one chosen."""
    alive = _alive(swarm)
    return gr.Dropdown(alive, value=alive[0] if alive else None)


def _index(data: Any) -> int:
    return int(data.index[0] if isinstance(data.index, list | tuple) else data.index)
