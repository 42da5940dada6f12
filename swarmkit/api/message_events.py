"""Pieces of a message: text, thoughts and calls of tools, read out of the text that a model writes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from swarmkit.api.rows import AnswerEnd, AnswerPiece
from swarmkit.api.tool_format import AnswerFormat
from swarmkit.client.token_chances import TokenRecord

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class TextDelta:
    """More of the text of a message."""

    row: int
    text: str
    tokens: tuple[TokenRecord, ...] = ()


@dataclass(frozen=True)
class ThoughtDelta:
    """More of what the model thinks before it answers."""

    row: int
    text: str


@dataclass(frozen=True)
class ToolCallMade:
    """A whole call of a tool.

    Attributes:
        number: its place among the calls of the message.
        arguments: JSON.
    """

    row: int
    number: int
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class MessageEnd:
    """A message has ended."""

    row: int
    reason: Literal["stop", "length", "tool_calls"]
    stop: str | None
    generated: int


MessageEvent = TextDelta | ThoughtDelta | ToolCallMade | MessageEnd


class MessageReader:
    """Reads one message while it grows."""

    def __init__(
        self,
        row: int,
        form: AnswerFormat,
        prompt: str,
        tools: list[dict[str, Any]] | None,
        most_calls: int | None,
    ) -> None:
        """Begin a message.

        Args:
            prompt: the text that the model was given, as rendered.
            tools: those that it may call.
            most_calls: later calls are left out; None = none is.
        """
        self._row = row
        self._calls = 0
        self._most_calls = most_calls
        self._unread = ""
        """The text of a call that is not whole yet."""
        self._parser = None
        self._first: list[dict[str, Any]] = []
        if form.template is not None:
            from transformers.utils.chat_parsing import ResponseParser

            prefix = prompt if form.is_own else _opened_thought(prompt)
            self._parser = ResponseParser(form.template, prefix=prefix, tools=[*(tools or ())])

    def read(self, event: AnswerPiece | AnswerEnd) -> Iterator[MessageEvent]:
        """Return what an event of the answer means for the message."""
        if isinstance(event, AnswerPiece):
            yield from self._text(event)
            return
        if self._parser is not None:
            try:
                _, found = self._parser.finalize()
            except ValueError:
                yield from self._give_up("")
            else:
                yield from self._events(found)
        reason: Literal["stop", "length", "tool_calls"] = event.reason
        if self._calls and reason == "stop":
            reason = "tool_calls"
        yield MessageEnd(self._row, reason, event.stop, event.generated)

    def _text(self, piece: AnswerPiece) -> Iterator[MessageEvent]:
        if self._parser is None:
            yield TextDelta(self._row, piece.text, piece.tokens)
            return
        try:
            found = self._parser.feed(piece.text)
        except ValueError:
            yield from self._give_up(piece.text)
            return
        read = list(self._events(found))
        if piece.tokens:  # which cannot be split between text and calls
            read = [
                _with_tokens(read, self._row, piece.tokens),
                *(e for e in read if not isinstance(e, TextDelta)),
            ]
        yield from read

    def _events(self, found: list[dict[str, Any]]) -> Iterator[MessageEvent]:
        for event in found:
            name, kind = event.get("field"), event["type"]
            if kind == "region_chunk" and event.get("dirty"):
                self._unread += event.get("text") or ""
            elif kind == "region_chunk" and event.get("text"):
                if name in _THOUGHTS:
                    yield ThoughtDelta(self._row, event["text"])
                elif name == "content":
                    yield TextDelta(self._row, event["text"])
            elif kind == "region_close" and name == "tool_calls":
                unread, self._unread = self._unread, ""
                calls = event.get("value")
                for call in calls if isinstance(calls, list) else [calls]:
                    yield from self._call(call, unread)

    def _call(self, value: Any, written: str) -> Iterator[MessageEvent]:
        function = value.get("function") if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            yield TextDelta(self._row, written)  # it is no call, whatever the model meant
            return
        if self._most_calls is not None and self._calls >= self._most_calls:
            return
        arguments = function.get("arguments", function.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        yield ToolCallMade(self._row, self._calls, f"call_{secrets.token_hex(12)}", function["name"], text)
        self._calls += 1

    def _give_up(self, text: str) -> Iterator[MessageEvent]:
        """Pass on as text what cannot be read, and all that follows."""
        self._parser = None
        unread, self._unread = self._unread + text, ""
        if unread:
            yield TextDelta(self._row, unread)


def _with_tokens(read: list[MessageEvent], row: int, tokens: tuple[TokenRecord, ...]) -> TextDelta:
    text = "".join(event.text for event in read if isinstance(event, TextDelta))
    return TextDelta(row, text, tokens)


def _opened_thought(prompt: str) -> str:
    """The beginning of the answer that a chat template writes itself, if it opens the model's thoughts."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""
