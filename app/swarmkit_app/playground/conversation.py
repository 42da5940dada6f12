"""A conversation as the page keeps it, and the settings that its visitor has chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swarmkit.client.speculation.assistants import Speculation

Message = dict[str, Any]
"""`role` and `content`, as gradio and chat templates have them; gradio's content may be a list of parts."""


@dataclass(frozen=True)
class ChatOptions:
    """What a visitor has set.

    Attributes:
        system: the system prompt; none if empty.
        temperature: 0 takes the likeliest token each time.
        seed: below 0 = another one for each answer.
        speculation: `"auto"`, `"prompt-lookup"` or `"off"`.
    """

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 200
    seed: int = -1
    speculation: Speculation = "auto"


def text_of(message: Message) -> str:
    """The text of a message, whether it is one string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else str(part.get("text", "")) for part in parts]
    return "".join(texts)


def plain(history: Sequence[Message]) -> list[Message]:
    """The same messages with text for content."""
    return [{"role": message["role"], "content": text_of(message)} for message in history]


def until_user(history: Sequence[Message], index: int) -> list[Message]:
    """The conversation up to the user's message at or before `index`, with that message.

    Returns: an empty list if the user has said nothing until there.
    """
    for place in range(min(index, len(history) - 1), -1, -1):
        if history[place]["role"] == "user":
            return plain(history[: place + 1])
    return []


def edited(history: Sequence[Message], index: int, text: str) -> list[Message]:
    """The conversation up to the user's message at `index`, which now says something else."""
    return [*plain(history[:index]), {"role": "user", "content": text}]


def prompt_of(history: Sequence[Message], options: ChatOptions) -> list[Message]:
    """The messages that the model is given."""
    system = [{"role": "system", "content": options.system}] if options.system.strip() else []
    return [*system, *plain(history)]
