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
from swarmkit_app.playground.kept_chats import add_kept_chats
from swarmkit_app.playground.parts import (
    ANSWERING,
    NEW_VERSION,
    QUICK,
    PageParts,
    add_stop,
    clearing,
    counted,
    health,
    idle_picture,
    session_of,
)
from swarmkit_app.playground.settings_panel import SettingsPanel, add_settings, options_of
from swarmkit_app.playground.style import scrolling

_PART = "chat"
_NOTHING_NEW = (gr.skip(),) * 4


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
        request: gr.Request, turn: float, history: list[Message], name: str, system: str, *settings: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        history = plain(history)
        if not history or not text_of(history[-1]).strip():
            yield _NOTHING_NEW
            return
        # A message of the model at the end is gone on with.
        begun = text_of(history[-1]) if history[-1]["role"] == "assistant" else ""
        before = history[:-1] if begun else history
        make = partial(chat_request, history=history, options=options_of(system, *settings))
        told = parts.answering.answer(session_of(request), counted(request), _PART, name, make, int(turn))
        async for progress in told:
            if not progress.is_wanted:
                yield _NOTHING_NEW
                return
            text = begun + progress.text
            reply = [{"role": "assistant", "content": text}] if text else []
            drawing = gr.skip() if progress.drawing is None else scrolling(progress.drawing)
            yield [*before, *reply], gr.skip(), drawing, progress.summary

    # One event for each click, with all that the page shows then: a Stop would come too early for a chain.
    async def said(
        request: gr.Request, turn: float, history: list[Message], text: str, name: str, *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        yield gr.skip(), "" if text.strip() else text, gr.skip(), gr.skip()
        asked = [*plain(history), {"role": "user", "content": text}]
        async for shown in answer(request, turn, asked, name, *rest):
            yield shown

    async def again(
        request: gr.Request, turn: float, history: list[Message], *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        async for shown in answer(request, turn, until_user(history, len(history)), *rest):
            yield shown

    async def retried(
        request: gr.Request, data: gr.RetryData, turn: float, history: list[Message], *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        async for shown in answer(request, turn, until_user(history, _index(data)), *rest):
            yield shown

    async def changed(
        request: gr.Request, data: gr.EditData, turn: float, history: list[Message], *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        async for shown in answer(request, turn, edited(history, _index(data), str(data.value)), *rest):
            yield shown

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
            kept = add_kept_chats()
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

    rest = [model, system, *settings.inputs]
    inputs, outputs = [parts.turn, chat, *rest], [chat, box, picture, summary]
    gr.on([box.submit, send.click], said, [parts.turn, chat, box, *rest], outputs, **ANSWERING)
    redo.click(again, inputs, outputs, **NEW_VERSION)
    more.click(answer, inputs, outputs, **ANSWERING)
    chat.retry(retried, inputs, outputs, **NEW_VERSION)
    chat.edit(changed, inputs, outputs, **NEW_VERSION)
    kept.follow(page, chat, summary, new, clearing(parts, _PART))
    model.change(chosen, model, [picture, able], **QUICK)
    page.load(chosen, model, [picture, able], **QUICK)
    if swarm is not None:
        _add_kills(page, swarm, victim, kill, add)
    return ChatTab(model, system, settings)


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
