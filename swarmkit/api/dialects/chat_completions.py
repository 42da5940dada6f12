"""OpenAI's chat completions: `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from pydantic import Field

from swarmkit.api.conversation import ChatRun, ChatWish
from swarmkit.api.dialects.openai_parts import (
    Name,
    Role,
    SamplingFields,
    StreamOptions,
    Wire,
    bias_of,
    call_of,
    chance,
    content_text,
    new_id,
    stops_of,
    tool_of,
    usage_of,
)
from swarmkit.api.message_events import MessageEnd, MessageEvent, TextDelta, ThoughtDelta, ToolCallMade
from swarmkit.api.refusals import invalid, text_only


class ChatMessage(Wire):
    """A message of the conversation so far."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(SamplingFields):
    """The body of a request for a chat completion."""

    model: Name
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=16)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    def wish(self, vocabulary: int) -> ChatWish:
        """What it asks for.

        Raises:
            ApiError: it asks for what a text model cannot do, or contradicts itself.
        """
        if self.audio is not None or any(each != "text" for each in self.modalities or ()):
            raise text_only("audio" if self.audio is not None else "modalities", "audio as a form of answer")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
        tools = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(self.tools or ())]
        options = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            options.setdefault("reasoning_effort", self.reasoning_effort)
        return ChatWish(
            messages=[_message(message, f"messages[{place}]") for place, message in enumerate(self.messages)],
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            tools=tools or None,
            choice=_choice(self.tool_choice),
            most_calls=1 if self.parallel_tool_calls is False else None,
            continues=bool(self.continue_final_message),
            schema=schema_of(self.response_format, "response_format"),
            answers=self.n or 1,
            stops=stops_of(self.stop),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            sampling=self.sampling() | {"logit_bias": bias_of(self.logit_bias, vocabulary)},
            options=options,
            params={"schema": "response_format"},
        )


def _message(message: ChatMessage, param: str) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    found: dict[str, Any] = {"role": role, "content": content_text(message.content, f"{param}.content")}
    if message.tool_calls:
        found["tool_calls"] = [
            _call(call, f"{param}.tool_calls[{place}]") for place, call in enumerate(message.tool_calls)
        ]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    return found


def _call(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        raise invalid(param, "a call of a tool has a function")
    return call_of(call.get("id"), function.get("name"), function.get("arguments"), param)


def _tool(tool: dict[str, Any], param: str) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise invalid(param, "this server knows tools of type 'function' only", "unsupported_tools")
    return tool_of(function.get("name"), function.get("description"), function.get("parameters"), param)


def _choice(choice: str | dict[str, Any] | None) -> str:
    if not isinstance(choice, dict):
        return choice or "auto"
    function = choice.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid("tool_choice", "tool_choice is none, auto, required, or names a function")
    return str(function["name"])


def schema_of(form: dict[str, Any] | None, param: str) -> dict[str, Any] | None:
    """The schema of a response format; an empty one for any object, None for free text."""
    kind = "text" if form is None else form.get("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {}
    if kind == "json_schema":
        schema = (
            form.get("json_schema", form).get("schema")
            if isinstance(form.get("json_schema", form), dict)
            else None
        )
        if isinstance(schema, dict):
            return schema
        raise invalid(param, "a response format of type json_schema has a schema")
    raise invalid(param, f"a response format is of type text, json_object or json_schema, not {kind!r}")


class ChatCompletionForm:
    """Words the answer to one request."""

    def __init__(self, request: ChatRequest, model: str, created: int, run: ChatRun) -> None:
        self._request = request
        self._run = run
        self._head = {"id": new_id("chatcmpl-"), "created": created, "model": model}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer while it grows."""
        head = {**self._head, "object": "chat.completion.chunk"}
        options = self._request.stream_options
        usage = {"usage": None} if options is not None and options.include_usage else {}
        begun: set[int] = set()
        async with aclosing(self._run.events()) as events:
            async for event in events:
                if event.row not in begun:
                    begun.add(event.row)
                    first = _chunk(event.row, {"role": "assistant", "content": ""})
                    yield {**head, "choices": [first], **usage}
                yield {**head, "choices": [_chunk_of(event)], **usage}
        if usage:
            yield {**head, "choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        """The answer when it is whole."""
        choices: dict[int, dict[str, Any]] = {}
        async for event in self._run.events():
            choice = choices.setdefault(
                event.row,
                {
                    "index": event.row,
                    "message": {"role": "assistant", "content": None, "refusal": None},
                    "logprobs": {"content": [], "refusal": None} if self._request.logprobs else None,
                    "finish_reason": None,
                },
            )
            _add(choice, event)
        for choice in choices.values():
            if choice["message"]["content"] is None and "tool_calls" not in choice["message"]:
                choice["message"]["content"] = ""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choices[row] for row in sorted(choices)],
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        return usage_of(self._run.prompt_tokens, self._run.cached_tokens, self._run.generated_tokens)


def _chunk(row: int, delta: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"index": row, "delta": delta, "logprobs": None, "finish_reason": None, **others}


def _logprobs(event: TextDelta) -> list[dict[str, Any]]:
    return [
        {**chance(each.chosen), "top_logprobs": [chance(other) for other in each.likeliest]}
        for each in event.tokens
    ]


def _call_made(event: ToolCallMade) -> dict[str, Any]:
    function = {"name": event.name, "arguments": event.arguments}
    return {"id": event.call_id, "type": "function", "function": function}


def _chunk_of(event: MessageEvent) -> dict[str, Any]:
    if isinstance(event, TextDelta):
        told = {"content": _logprobs(event), "refusal": None} if event.tokens else None
        return _chunk(event.row, {"content": event.text}, logprobs=told)
    if isinstance(event, ThoughtDelta):
        return _chunk(event.row, {"reasoning_content": event.text})
    if isinstance(event, ToolCallMade):
        return _chunk(event.row, {"tool_calls": [{"index": event.number, **_call_made(event)}]})
    return _chunk(event.row, {}, finish_reason=event.reason)


def _add(choice: dict[str, Any], event: MessageEvent) -> None:
    message = choice["message"]
    if isinstance(event, TextDelta):
        message["content"] = (message["content"] or "") + event.text
        if choice["logprobs"] is not None:
            choice["logprobs"]["content"] += _logprobs(event)
    elif isinstance(event, ThoughtDelta):
        message["reasoning_content"] = message.get("reasoning_content", "") + event.text
    elif isinstance(event, ToolCallMade):
        message.setdefault("tool_calls", []).append(_call_made(event))
    elif isinstance(event, MessageEnd):
        choice["finish_reason"] = event.reason
