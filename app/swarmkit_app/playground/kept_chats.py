"""Conversations and their versions, which `static/page.js` keeps in the visitor's browser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr


@dataclass(frozen=True)
class KeptChats:
    """The components with which a visitor finds a conversation again."""

    picker: gr.Dropdown
    keeps: gr.Checkbox
    forget: gr.Button

    def follow(
        self, page: gr.Blocks, chat: gr.Chatbot, summary: gr.Markdown, new: gr.Button, clear: dict[str, Any]
    ) -> None:
        """Keep what the chat shows, and show what was kept.

        The browser does all of this alone: no conversation is sent anywhere but to be answered.

        Args:
            new: begins another conversation.
            clear: an event that ends the answer under way, before another conversation takes its place.
        """
        picker, shown = self.picker, [chat, self.picker, summary]
        page.load(None, None, [chat, picker, self.keeps], js="() => swarmkit.restore()")
        chat.change(None, chat, picker, js="(messages) => swarmkit.keep(messages)")
        new.click(**clear).then(None, chat, shown, js="(messages) => swarmkit.fresh(messages)")
        choice = [picker, chat]
        picker.input(**clear).then(None, choice, shown, js="(key, messages) => swarmkit.open(key, messages)")
        self.forget.click(**clear).then(None, None, shown, js="() => swarmkit.forget()")
        answer = "(keeps, messages) => swarmkit.remember(keeps, messages)"
        self.keeps.change(None, [self.keeps, chat], picker, js=answer)


def add_kept_chats() -> KeptChats:
    """Lay the components out where the page is being built."""
    with gr.Row(elem_classes="sk-kept"):
        picker = gr.Dropdown(
            [], label="Conversations in this browser", info="An edit begins a further version", scale=3
        )
        with gr.Column(min_width=160):
            keeps = gr.Checkbox(True, label="Keep them", info="Off: gone with the page")
            forget = gr.Button("Forget all", size="sm", min_width=100)
    return KeptChats(picker, keeps, forget)
