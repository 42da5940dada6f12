"""Anthropic's messages: `POST /v1/messages`, and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from pydantic import Field

from swarmkit.api.conversation import ChatRun, ChatWish
from swarmkit.api.dialects.openai_parts import (
    Name,
    Wire,
    call_of,
    content_text,
    new_id,
    part_text,
    stops_of,
    tool_of,
)
from swarmkit.api.engine import new_seed
from swarmkit.api.message_events import MessageEnd, MessageEvent, TextDelta, ThoughtDelta, ToolCallMade
from swarmkit.api.refusals import ApiError, invalid

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

Event = tuple[str, dict[str, Any]]


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic words it."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    message = f"{error.param}: {error.message}" if error.param else error.message
    return {"type": "error", "error": {"type": _KINDS.get(error.status, usual), "message": message}}


class InputMessage(Wire):
    """A message of the conversation so far."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountRequest(Wire):
    """The body of a request for the number of tokens of a prompt."""

    model: Name
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None

    def wish(self) -> ChatWish:
        """What it asks for.

        Raises:
            ApiError: it asks for what a text model cannot do, or contradicts itself.
        """
        for name in ("mcp_servers", "container"):
            if getattr(self, name):
                raise invalid(name, f"this server has no {name}; leave them out", "unsupported_tools")
        tools = [_tool(tool, f"tools.{place}") for place, tool in enumerate(self.tools or ())]
        choice = self.tool_choice or {}
        return ChatWish(
            messages=self._messages(),
            tools=tools or None,
            choice=_choice(choice),
            most_calls=1 if choice.get("disable_parallel_tool_use") else None,
            continues=self.messages[-1].role == "assistant",
            schema=self._schema(),
            params={"schema": "output_config.format"},
            options=_thoughts(self.thinking),
        )

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": content_text(self.system, "system")})
        for place, message in enumerate(self.messages):
            found += _message(message, f"messages.{place}.content")
        return found

    def _schema(self) -> dict[str, Any] | None:
        given = self.output_format or (self.output_config or {}).get("format")
        if given is None:
            return None
        if (
            isinstance(given, dict)
            and given.get("type") == "json_schema"
            and isinstance(given.get("schema"), dict)
        ):
            return dict(given["schema"])
        raise invalid("output_config.format", "a format is of type json_schema, and has a schema")


class MessagesRequest(CountRequest):
    """The body of a request for a message."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)

    def wish(self) -> ChatWish:
        """What it asks for; see `CountRequest.wish`."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        fields = vars(super().wish())
        return ChatWish(
            **{
                **fields,
                "max_tokens": self.max_tokens,
                "stops": stops_of(self.stop_sequences, "stop_sequences"),
                "sampling": {**given, "seed": new_seed()},
            }
        )


def _thoughts(thinking: dict[str, Any] | None) -> dict[str, Any]:
    """The option of chat templates by which models think before they answer, or do not."""
    if thinking is None or not isinstance(thinking.get("type"), str):
        return {}
    return {"enable_thinking": thinking["type"] != "disabled"}


def _message(message: InputMessage, param: str) -> list[dict[str, Any]]:
    """One message as chat templates have it: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts, texts = "", ""
    for place, block in enumerate(message.content):
        where = f"{param}.{place}"
        match block.get("type"):
            case "tool_use":
                calls.append(call_of(block.get("id"), block.get("name"), block.get("input"), where))
            case "tool_result":
                text = content_text(block.get("content"), f"{where}.content")
                results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
            case "thinking" if isinstance(block.get("thinking"), str):
                thoughts += block["thinking"]
            case "redacted_thinking":
                pass  # which nobody but its writer can read
            case _:
                texts += part_text(block, where)
    own: dict[str, Any] = {"role": message.role, "content": texts}
    if calls:
        own["tool_calls"] = calls
    if thoughts:
        own["reasoning_content"] = thoughts
    return [*results, own] if texts or calls or thoughts or not results else results


def _tool(tool: dict[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        message = f"this server runs no tools of its own, such as {tool.get('type')!r}; leave it out"
        raise invalid(param, message, "unsupported_tools")
    return tool_of(tool.get("name"), tool.get("description"), tool.get("input_schema"), param)


def _choice(choice: dict[str, Any]) -> str:
    kind = choice.get("type", "auto")
    if kind == "tool" and isinstance(choice.get("name"), str):
        return str(choice["name"])
    try:
        return {"auto": "auto", "any": "required", "none": "none"}[kind]
    except (KeyError, TypeError):
        raise invalid("tool_choice", "a choice is of type auto, any, none, or tool with a name") from None


class MessageForm:
    """Words the answer to one request."""

    def __init__(self, model: str, run: ChatRun) -> None:
        self._run = run
        self._blocks: list[dict[str, Any]] = []
        self._message: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._blocks,
            "stop_reason": None,
            "stop_sequence": None,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer when it is whole."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        return {**self._message, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer while it grows: the names and the data of events."""
        has_begun = False
        async with aclosing(self._run.events()) as told:
            async for event in told:
                if not has_begun:
                    has_begun = True
                    message = {**self._message, "content": [], "usage": self._usage()}
                    yield "message_start", {"message": message}
                for each in self._of(event):
                    yield each
        yield (
            "message_delta",
            {
                "delta": {name: self._message[name] for name in ("stop_reason", "stop_sequence")},
                "usage": self._usage(),
            },
        )
        yield "message_stop", {}

    def _usage(self) -> dict[str, Any]:
        run = self._run
        return {
            "input_tokens": run.prompt_tokens - run.cached_tokens,
            "cache_read_input_tokens": run.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": run.generated_tokens,
        }

    def _of(self, event: MessageEvent) -> list[Event]:
        if isinstance(event, MessageEnd):
            self._message["stop_reason"] = (
                "stop_sequence" if event.stop is not None else _REASONS[event.reason]
            )
            self._message["stop_sequence"] = event.stop
            return self._close()
        if isinstance(event, ToolCallMade):
            return self._call(event)
        if isinstance(event, ThoughtDelta):
            opened = self._open("thinking", {"thinking": "", "signature": ""})
            self._blocks[-1]["thinking"] += event.text
            return [*opened, self._delta({"type": "thinking_delta", "thinking": event.text})]
        assert isinstance(event, TextDelta)
        if not event.text:
            return []
        opened = self._open("text", {"text": "", "citations": None})
        self._blocks[-1]["text"] += event.text
        return [*opened, self._delta({"type": "text_delta", "text": event.text})]

    def _call(self, event: ToolCallMade) -> list[Event]:
        closed = self._close()
        head = {"type": "tool_use", "id": event.call_id.replace("call_", "toolu_"), "name": event.name}
        try:
            given = json.loads(event.arguments)
        except ValueError:
            given = {}
        given = given if isinstance(given, dict) else {}
        self._blocks.append({**head, "input": given})
        start = {"index": len(self._blocks) - 1, "content_block": {**head, "input": {}}}
        delta = self._delta(
            {"type": "input_json_delta", "partial_json": json.dumps(self._blocks[-1]["input"])}
        )
        return [*closed, ("content_block_start", start), delta]

    def _open(self, kind: str, fields: dict[str, Any]) -> list[Event]:
        if self._blocks and self._blocks[-1]["type"] == kind:
            return []
        closed = self._close()
        self._blocks.append({"type": kind, **fields})
        start = {"index": len(self._blocks) - 1, "content_block": {"type": kind, **fields}}
        return [*closed, ("content_block_start", start)]

    def _close(self) -> list[Event]:
        return [("content_block_stop", {"index": len(self._blocks) - 1})] if self._blocks else []

    def _delta(self, delta: dict[str, Any]) -> Event:
        return "content_block_delta", {"index": len(self._blocks) - 1, "delta": delta}
