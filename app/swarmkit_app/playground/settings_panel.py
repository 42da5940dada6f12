"""The settings of an answer, as the page shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from swarmkit.client.speculation.assistants import Speculation
from swarmkit_app.playground.conversation import ChatOptions

PRESETS = {"exact": (0.0, 1.0), "balanced": (0.7, 0.95), "free": (1.0, 1.0)}
"""Temperature and top p under a name: the likeliest token each time, a little variety, and all of it."""


@dataclass(frozen=True)
class SettingsPanel:
    """The components, in the order in which `options_of` takes their values."""

    inputs: list[Any]


def add_settings(most_tokens: int) -> SettingsPanel:
    """Lay the settings out where the page is being built."""
    preset = gr.Radio(list(PRESETS), value="exact", label="Preset", info="Sets temperature and top p")
    with gr.Row():
        temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="Share of likely tokens to draw from")
    with gr.Row():
        top_k = gr.Slider(0, 100, 0, step=1, label="Top k", info="0: all tokens")
        penalty = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty", info="1: none")
    with gr.Row():
        length = gr.Slider(1, most_tokens, min(200, most_tokens), step=1, label="Longest answer, in tokens")
        seed = gr.Number(-1, label="Seed", info="below 0: another one each time", precision=0)
    stops = gr.Textbox("", label="Stop at", info="One text in each line; an answer ends before it", lines=1)
    speculation = gr.Radio(
        list(get_args(Speculation)),
        value="auto",
        label="Draft tokens",
        info="Tokens that are guessed ahead over long distances",
    )
    preset.input(
        lambda name: PRESETS[name], preset, [temperature, top_p], queue=False, show_progress="hidden"
    )
    return SettingsPanel([temperature, top_p, top_k, penalty, length, seed, stops, speculation])


def options_of(
    system: str | None,
    temperature: float,
    top_p: float,
    top_k: float,
    penalty: float,
    length: float,
    seed: float | None,
    stops: str | None,
    speculation: Speculation,
) -> ChatOptions:
    """What the components say."""
    return ChatOptions(
        system=system or "",
        temperature=temperature,
        top_p=top_p,
        max_tokens=int(length),
        seed=-1 if seed is None else int(seed),
        speculation=speculation,
        top_k=int(top_k),
        repetition_penalty=penalty,
        stops=tuple(line for line in (stops or "").splitlines() if line)[:16],
    )
