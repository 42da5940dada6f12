"""The tab that puts one question twice, with two models or settings, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial
from typing import Any, TypeVar

import gradio as gr

from swarmkit_app.playground.conversation import ChatOptions, chat_request
from swarmkit_app.playground.parts import ANSWERING, PageParts, add_stop, counted, session_of

_SIDES = ("left", "right")

T = TypeVar("T")


def add_compare_tab(parts: PageParts) -> None:
    """Lay the tab out where the page is being built."""

    async def told(
        request: gr.Request, turn: float, side: str, text: str, length: float, *rest: Any
    ) -> AsyncGenerator[tuple[Any, Any], None]:
        asked = [{"role": "user", "content": text}]
        make = partial(chat_request, history=asked, options=_options(int(length), *rest[1:]))
        visitor = session_of(request), counted(request)
        async for progress in parts.answering.answer(*visitor, side, rest[0], make, int(turn)):
            yield (progress.text, progress.summary) if progress.is_wanted else (gr.skip(), gr.skip())

    async def answer(
        request: gr.Request, turn: float, text: str, length: float, *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        if not text.strip():
            yield gr.skip(), "Write a question first.", gr.skip(), "Write a question first."
            return
        half = len(rest) // 2
        sides = zip(_SIDES, (rest[:half], rest[half:]), strict=True)
        async for both in side_by_side(
            [told(request, turn, side, text, length, *own) for side, own in sides]
        ):
            yield tuple(value for each in both for value in each or (gr.skip(), gr.skip()))

    text = gr.Textbox(label="Question", placeholder="Ask both", lines=2)
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", size="md", min_width=80)
        add_stop(parts, *_SIDES)
        length = gr.Slider(
            1, parts.most_tokens, min(200, parts.most_tokens), step=1, label="Longest answer, in tokens"
        )
    inputs: list[Any] = []
    outputs: list[Any] = []
    with gr.Row(equal_height=False):
        for side, temperature in zip(_SIDES, (0.0, 0.9), strict=True):
            with gr.Column(min_width=300):
                shown = gr.Textbox(
                    label=f"Answer on the {side}", lines=6, interactive=False, elem_classes="sk-answer"
                )
                summary = gr.Markdown("No answer yet.", elem_classes="sk-summary")
                inputs += [
                    gr.Dropdown(parts.names, value=parts.names[0], label=f"Model on the {side}"),
                    gr.Textbox("", label=f"System prompt on the {side}"),
                    gr.Slider(0, 2, temperature, step=0.05, label=f"Temperature on the {side}"),
                    gr.Slider(0.05, 1, 1, step=0.05, label=f"Top p on the {side}"),
                    gr.Number(0, label=f"Seed on the {side}", precision=0),
                ]
                outputs += [shown, summary]
    # One event for both: gradio begins a second event of the same click once the first has ended.
    gr.on([ask.click, text.submit], answer, [parts.turn, text, length, *inputs], outputs, **ANSWERING)


async def side_by_side(told: Sequence[AsyncIterator[T]]) -> AsyncGenerator[list[T | None], None]:
    """Read several iterators at once, each until its end.

    Yields: what is new of each, None where nothing is.
    """
    news: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue()

    async def read(place: int, each: AsyncIterator[T]) -> None:
        try:
            async for value in each:
                await news.put((place, value))
        finally:
            await news.put(None)

    tasks = [asyncio.create_task(read(place, each)) for place, each in enumerate(told)]
    try:
        under_way = len(tasks)
        while under_way:
            new = await news.get()
            if new is None:
                under_way -= 1
            else:
                yield [new[1] if place == new[0] else None for place in range(len(tasks))]
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _options(length: int, system: str, temperature: float, top_p: float, seed: float | None) -> ChatOptions:
    return ChatOptions(system or "", temperature, top_p, length, -1 if seed is None else int(seed))
