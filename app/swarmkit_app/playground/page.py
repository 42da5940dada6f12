"""The page: a chat, its way through the swarm beside it, and a tab with all servers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, get_args

import gradio as gr

from swarmkit.api.engine import AnswerEngine
from swarmkit.api.refusals import ApiError
from swarmkit.client.pictures import server_pictures
from swarmkit.client.speculation.assistants import Speculation
from swarmkit.drawing.bundle import table
from swarmkit.drawing.pipeline import pipeline_svg
from swarmkit.drawing.swarm import coverage, swarm_rows, swarm_svg
from swarmkit.drawing.values import PipelinePicture, ServerPicture
from swarmkit.errors import SwarmkitError
from swarmkit.local.swarm import LocalSwarm
from swarmkit_app.playground.answers import AnswerRun
from swarmkit_app.playground.conversation import ChatOptions, Message, edited, plain, text_of, until_user

MOST_TOKENS = 2048
_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]

CSS = """
.sk-summary { min-height: 3em; }
.sk-picture { overflow: hidden !important; }
.sk-scroll { overflow-x: auto; }
.sk-scroll svg { min-width: 460px; }
pre, pre code { white-space: pre-wrap !important; }
button[role=tab][aria-selected=true] { color: var(--primary-700) !important; }
.dark button[role=tab][aria-selected=true] { color: var(--primary-300) !important; }
footer { display: none !important; }
"""


@dataclass
class Visitors:
    """The answer that each visitor's page waits for; a visitor has one at a time."""

    running: dict[str, AnswerRun] = field(default_factory=dict)

    def begin(self, visitor: str, run: AnswerRun) -> None:
        """End the visitor's answer that is under way, if one is, and note another."""
        self.stop(visitor)
        self.running[visitor] = run

    def stop(self, visitor: str) -> None:
        """End the visitor's answer, if one is under way."""
        if (run := self.running.pop(visitor, None)) is not None:
            run.stop()

    def end(self, visitor: str, run: AnswerRun) -> None:
        """Forget an answer that has ended, unless another has taken its place."""
        if self.running.get(visitor) is run:
            del self.running[visitor]


def theme() -> gr.Theme:
    """Colours and fonts; all fonts are the reader's own, so that nothing is fetched."""
    soft = gr.themes.Soft(font=_FONT, font_mono=_MONO)  # type: ignore[arg-type]
    # The theme's own labels are too pale on its light ground to be read by everybody (WCAG 2, contrast 4.5).
    return soft.set(
        block_title_text_color="*primary_800",
        block_label_text_color="*primary_800",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
    )


def build_page(
    engines: dict[str, AnswerEngine], swarm: LocalSwarm | None = None, max_running: int = 8
) -> gr.Blocks:
    """Lay out the page.

    Args:
        engines: what answers, by the name of the model.
        swarm: the local swarm that serves the model, whose servers visitors may then kill.
        max_running: answers at a time; further ones wait in a queue.
    """
    visitors = Visitors()
    first = next(iter(engines))

    async def answer(
        history: list[Message],
        name: str,
        system: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        seed: float,
        speculation: Speculation,
        request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        history = plain(history)
        if not history or history[-1]["role"] != "user" or not text_of(history[-1]).strip():
            yield history, gr.skip(), gr.skip()
            return
        options = ChatOptions(system or "", temperature, top_p, int(max_tokens), int(seed), speculation)
        run = AnswerRun(engines[name], history, options)
        visitor = str(request.session_hash)
        visitors.begin(visitor, run)
        shown = ""
        try:
            async for progress in run.progress():
                shown = progress.text
                reply = [{"role": "assistant", "content": shown}] if shown else []
                yield [*history, *reply], _scrolling(progress.drawing), progress.summary
        except (SwarmkitError, ApiError) as error:
            reply = [{"role": "assistant", "content": shown}] if shown else []
            yield [*history, *reply], gr.skip(), f"⚠ {error}"
        finally:
            visitors.end(visitor, run)

    def stop(request: gr.Request) -> None:
        visitors.stop(str(request.session_hash))

    async def stop_on_loop(request: gr.Request) -> None:
        stop(request)

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

    def overview(name: str) -> str:
        return swarm_tab(engines[name])

    def idle_picture(name: str) -> str:
        return _idle_picture(engines[name])

    with gr.Blocks(title="swarmkit playground", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# swarmkit playground\n{_introduction(first, swarm)}")
        with gr.Tab("Chat"), gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation", editable="user", buttons=["copy", "copy_all"], height=430
                )
                box = gr.Textbox(label="Message", placeholder="Ask something", autofocus=True, lines=1)
                with gr.Row():
                    send = gr.Button("Send", variant="primary", size="md", min_width=80)
                    halt = gr.Button("Stop", variant="stop", size="md", min_width=80)
                    redo = gr.Button("Regenerate", size="md", min_width=110)
                    new = gr.Button("New chat", size="md", min_width=90)
            with gr.Column(scale=4, min_width=320):
                picture = gr.HTML(_idle_picture(engines[first]), elem_classes="sk-picture", label="Pipeline")
                summary = gr.Markdown("No answer yet.", elem_classes="sk-summary")
                if swarm is not None:
                    with gr.Row():
                        victim = gr.Dropdown(_alive(swarm), label="Server", scale=2, min_width=160)
                        kill = gr.Button("Kill this server", variant="stop", min_width=120)
                        add = gr.Button("Add a server", min_width=120)
                with gr.Accordion("Settings", open=False):
                    model = gr.Dropdown(list(engines), value=first, label="Model")
                    system = gr.Textbox("", label="System prompt", lines=2)
                    with gr.Row():
                        temperature = gr.Slider(
                            0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token"
                        )
                        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p")
                    with gr.Row():
                        length = gr.Slider(1, MOST_TOKENS, 200, step=1, label="Longest answer, in tokens")
                        seed = gr.Number(-1, label="Seed", info="below 0: another one each time", precision=0)
                    speculation = gr.Radio(
                        list(get_args(Speculation)),
                        value="auto",
                        label="Draft tokens",
                        info="Tokens that are guessed ahead over long distances",
                    )
        with gr.Tab("Swarm"):
            everything = gr.HTML(swarm_tab(engines[first]), elem_classes="sk-picture")
            clock = gr.Timer(2.0)
            clock.tick(overview, model, everything, show_progress="hidden", concurrency_limit=4)
        with gr.Tab("API"):
            gr.Markdown(_api_text(first))

        inputs = [chat, model, system, temperature, top_p, length, seed, speculation]
        outputs = [chat, picture, summary]
        running: Any = {"concurrency_id": "answers", "concurrency_limit": max_running}
        quick: Any = {"queue": False, "show_progress": "hidden"}
        answering: Any = {"show_progress": "hidden", **running}
        gr.on([box.submit, send.click], said, [chat, box], [chat, box], **quick).then(
            answer, inputs, outputs, **answering
        )
        redo.click(stop_on_loop, **quick).then(again, chat, chat, **quick).then(
            answer, inputs, outputs, **answering
        )
        chat.retry(retried, chat, chat, **quick).then(answer, inputs, outputs, **answering)
        chat.edit(changed, chat, chat, **quick).then(answer, inputs, outputs, **answering)
        halt.click(stop_on_loop, **quick)
        new.click(stop_on_loop, **quick).then(list, None, chat, **quick)
        model.change(idle_picture, model, picture, **quick)
        page.unload(stop)
        if swarm is not None:
            local = swarm

            def end_server(label: str | None) -> Any:
                for number, server in enumerate(local.servers):
                    if label is not None and label.startswith(f"server-{number} ") and server.alive:
                        server.kill()
                return _choice(local)

            def add_server() -> Any:
                local.add_server(_thinnest(local))
                return _choice(local)

            def refresh() -> Any:
                return _choice(local)

            page.load(refresh, None, victim, **quick)
            kill.click(end_server, victim, victim, show_progress="hidden")
            add.click(add_server, None, victim, show_progress="minimal")
    return page


def swarm_tab(engine: AnswerEngine) -> str:
    """All servers of a model, as HTML."""
    client = engine.model.connection.client
    servers = server_pictures(client.servers())
    name, num_blocks = client.model.name, client.model.num_blocks
    drawing = swarm_svg(name, num_blocks, servers)
    alone = _needed(num_blocks, servers)
    warning = f"<p>If one of these left, the model would stop: {escape(alone)}</p>" if alone else ""
    return _scrolling(drawing + warning + table(swarm_rows(servers)), "Swarm")


def _needed(num_blocks: int, servers: Sequence[ServerPicture]) -> str:
    counts = coverage(num_blocks, servers)
    alone = [
        f"{server.label} [{server.blocks}]"
        for server in servers
        if server.state == "online" and 1 in counts[server.start : server.stop]
    ]
    return ", ".join(alone)


def _idle_picture(engine: AnswerEngine) -> str:
    client = engine.model.connection.client
    servers = server_pictures(client.servers())
    picture = PipelinePicture(client.model.name, client.model.num_blocks, servers=servers)
    return _scrolling(pipeline_svg(picture))


def _scrolling(content: str, label: str = "Pipeline") -> str:
    """A part of the page that scrolls sideways on narrow windows, by keyboard, too."""
    return f'<div class="sk-scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def _alive(swarm: LocalSwarm) -> list[str]:
    return [f"{each.label} [{each.blocks}]" for each in swarm.pictures() if each.state == "online"]


def _choice(swarm: LocalSwarm) -> Any:
    """The servers that can be killed, the first one chosen."""
    alive = _alive(swarm)
    return gr.Dropdown(alive, value=alive[0] if alive else None)


def _thinnest(swarm: LocalSwarm) -> tuple[int, int]:
    """The blocks of a server, running or not, which the fewest running servers have."""
    counts = coverage(swarm.checkpoint.num_blocks, swarm.pictures())
    chosen = min(swarm.pictures(), key=lambda each: (min(counts[each.start : each.stop]), each.start))
    return chosen.start, chosen.stop


def _index(data: Any) -> int:
    return int(data.index[0] if isinstance(data.index, list | tuple) else data.index)


def _introduction(name: str, swarm: LocalSwarm | None) -> str:
    where = (
        f"`{name}` runs on {len(swarm.servers)} servers on this machine. Kill one while it answers."
        if swarm is not None
        else f"`{name}` runs on the servers of a swarm, which see the hidden states of what you write."
    )
    return f"{where} Nothing of a conversation is stored; it is gone when you close the page."


def _api_text(name: str) -> str:
    return f"""
Programs use the same model over HTTP, by OpenAI's and Anthropic's protocols:

```sh
swarmkit api {name} --join ADDRESS --port 8000
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
```
"""
