"""OpenAI's responses: `POST /v1/responses`, and the responses that the server remembers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from swarmkit.api.conversation import ChatWish
from swarmkit.api.dialects.chat_completions import schema_of
from swarmkit.api.dialects.openai_parts import (
    Name,
    SamplingFields,
    call_of,
    content_text,
    tool_of,
)
from swarmkit.api.refusals import invalid

_LOGPROBS = "message.output_text.logprobs"
_UNSUPPORTED = {
    "background": "this server answers at once, and not in the background",
    "conversation": "this server keeps no conversations; use previous_response_id, or send the whole input",
    "prompt": "this server keeps no prompts; send the input itself",
}


class ResponsesRequest(SamplingFields):
    """The body of a request for a response."""

    model: Name
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def tells_logprobs(self) -> bool:
        """Whether probabilities are asked for."""
        return _LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def wish(self, earlier: list[dict[str, Any]]) -> ChatWish:
        """What it asks for.

        Args: earlier: the messages of the response that it follows.

        Raises:
            ApiError: it asks for what a text model cannot do, or contradicts itself.
        """
        for name, why in _UNSUPPORTED.items():
            if getattr(self, name):
                raise invalid(name, why, "unsupported_parameter")
        opening = [{"role": "system", "content": self.instructions}] if self.instructions else []
        effort = (self.reasoning or {}).get("effort")
        return ChatWish(
            messages=[*opening, *earlier, *self.messages()],
            max_tokens=self.max_output_tokens,
            tools=[tool for tool, _ in self._functions()] or None,
            choice=self._choice(),
            most_calls=1 if self.parallel_tool_calls is False else None,
            schema=schema_of((self.text or {}).get("format"), "text.format"),
            logprobs=(self.top_logprobs or 0) if self.tells_logprobs else None,
            sampling=self.sampling(),
            options={"reasoning_effort": effort} if isinstance(effort, str) else {},
            params={"messages": "input", "schema": "text.format"},
        )

    def messages(self) -> list[dict[str, Any]]:
        """The input as chat templates have it."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        found: list[dict[str, Any]] = []
        thoughts = ""
        for place, item in enumerate(self.input):
            where = f"input[{place}]"
            match item.get("type", "message"):
                case "message":
                    role = item.get("role")
                    if role not in ("system", "developer", "user", "assistant"):
                        raise invalid(f"{where}.role", "a role is system, developer, user or assistant")
                    role = "system" if role == "developer" else role
                    text = content_text(item.get("content"), f"{where}.content")
                    found.append({"role": role, "content": text})
                case "function_call":
                    name = whole_name(item.get("namespace"), item.get("name"))
                    call = call_of(item.get("call_id"), name, item.get("arguments"), where)
                    if not found or found[-1]["role"] != "assistant":
                        found.append({"role": "assistant", "content": ""})
                    found[-1].setdefault("tool_calls", []).append(call)
                case "function_call_output":
                    text = content_text(item.get("output"), f"{where}.output")
                    found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
                case "reasoning":
                    thoughts = _thoughts(item)
                    continue
                case other:
                    raise invalid(
                        where, f"this server takes no input of type {other!r}", "unsupported_content"
                    )
            if thoughts and found[-1]["role"] == "assistant":
                found[-1]["reasoning_content"] = thoughts
            thoughts = ""
        return found

    def namespaces(self) -> dict[str, tuple[str, str]]:
        """Namespace and own name of each function in a namespace, by the name that the model knows."""
        return {
            tool["function"]["name"]: (space, tool["function"]["name"][len(space) + 1 :])
            for tool, space in self._functions()
            if space
        }

    def _functions(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The tools in the form of chat templates, each with its namespace, which is part of its name too."""
        for place, tool in enumerate(self.tools or ()):
            where = f"tools[{place}]"
            if tool.get("type") != "namespace":
                yield _tool(tool, where), ""
                continue
            space, within = tool.get("name"), tool.get("tools")
            if not isinstance(space, str) or not space or not isinstance(within, list):
                raise invalid(where, "a namespace has a name and a list of tools")
            for inner, each in enumerate(within):
                if not isinstance(each, dict):
                    raise invalid(f"{where}.tools[{inner}]", "a tool is an object")
                yield _tool(each, f"{where}.tools[{inner}]", space), space

    def _choice(self) -> str:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice or "auto"
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            raise invalid("tool_choice", "tool_choice is none, auto, required, or names a function")
        return str(choice["name"])


def _tool(tool: dict[str, Any], param: str, namespace: str = "") -> dict[str, Any]:
    if tool.get("type") != "function":
        message = f"this server runs no tools of its own, such as {tool.get('type')!r}; leave it out"
        raise invalid(param, message, "unsupported_tools")
    name = whole_name(namespace, tool.get("name"))
    return tool_of(name, tool.get("description"), tool.get("parameters"), param)


def whole_name(namespace: Any, name: Any) -> Any:
    """What the model calls a function."""
    return f"{namespace}.{name}" if namespace and isinstance(namespace, str) and name else name


def _thoughts(item: dict[str, Any]) -> str:
    parts = item.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))
