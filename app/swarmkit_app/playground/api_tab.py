"""The tab that says how programs ask the same with the settings of the chat."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from swarmkit_app.playground.chat_tab import ChatTab
from swarmkit_app.playground.conversation import ChatOptions
from swarmkit_app.playground.parts import QUICK
from swarmkit_app.playground.settings_panel import options_of

_URL = "http://127.0.0.1:8000/v1"


def add_api_tab(tab: gr.Tab, chat: ChatTab, first: str) -> None:
    """Lay the tab out where the page is being built; it follows the settings when it is opened."""

    def snippets(name: str, system: str, *settings: Any) -> str:
        return _snippets(name, options_of(system, *settings))

    shown = gr.Markdown(_snippets(first, ChatOptions()))
    tab.select(snippets, [chat.model, chat.system, *chat.settings.inputs], shown, **QUICK)


def _snippets(name: str, options: ChatOptions) -> str:
    fence = "`" * 8  # longer than any in what a visitor has written
    parts = [
        "Programs use the same model over HTTP, by OpenAI's and Anthropic's protocols. Start the server:",
        serve_command(name),
        "With curl, and the settings of the chat:",
        as_curl(name, options),
        "The same with Python:",
        as_python(name, options),
    ]
    return "\n\n".join(
        f"{fence}text\n{part}\n{fence}" if number % 2 else part for number, part in enumerate(parts)
    )


def serve_command(name: str) -> str:
    """The command that starts the API of a model."""
    return f"swarmkit api {name} --join ADDRESS --port 8000"


def as_curl(name: str, options: ChatOptions) -> str:
    """A request with these settings, for a shell."""
    body = json.dumps(_body(name, options), indent=2, ensure_ascii=False).replace("'", "'\\''")
    return f"curl {_URL}/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def as_python(name: str, options: ChatOptions) -> str:
    """The same for OpenAI's client; parameters that it does not know go into `extra_body`."""
    own = ("top_k", "repetition_penalty")
    body = _body(name, options)
    extra = {key: body.pop(key) for key in own if key in body}
    if extra:
        body["extra_body"] = extra
    lines = [f"    {key}={value!r}," for key, value in body.items()]
    return "\n".join(
        [
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url="{_URL}", api_key="none")',
            "answer = client.chat.completions.create(",
            *lines,
            ")",
            "print(answer.choices[0].message.content)",
        ]
    )


def _body(name: str, options: ChatOptions) -> dict[str, Any]:
    """The request as OpenAI's protocol has it; settings that change nothing are left out."""
    system = [{"role": "system", "content": options.system}] if options.system.strip() else []
    body: dict[str, Any] = {
        "model": name,
        "messages": [*system, {"role": "user", "content": "Hello!"}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
    }
    usual = ChatOptions()
    for key in ("top_p", "top_k", "repetition_penalty", "seed"):
        if getattr(options, key) != getattr(usual, key):
            body[key] = getattr(options, key)
    if options.stops:
        body["stop"] = list(options.stops)
    return body
