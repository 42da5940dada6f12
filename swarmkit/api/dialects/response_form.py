"""The answer to a request for a response: its items, and the events by which they grow."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from swarmkit.api.conversation import ChatRun
from swarmkit.api.dialects.openai_parts import call_of, chance, error_body, new_id
from swarmkit.api.dialects.responses import ResponsesRequest, whole_name
from swarmkit.api.message_events import MessageEnd, MessageEvent, TextDelta, ThoughtDelta, ToolCallMade
from swarmkit.api.refusals import ApiError

Event = dict[str, Any]


class ResponseForm:
    """Words the answer to one request."""

    def __init__(self, request: ResponsesRequest, model: str, created: int, run: ChatRun) -> None:
        self._request = request
        self._run = run
        self._items: list[dict[str, Any]] = []
        self._sequence = -1
        self._namespaces = request.namespaces()
        sampling = run.request.sampling
        self.response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": model,
            "output": self._items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None, **(request.reasoning or {})},
            "store": request.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}, **(request.text or {})},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer when it is whole."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        return self.response

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer while it grows. The first event comes when the prompt has been computed."""
        async with aclosing(self._run.events()) as told:
            async for event in told:
                if self._sequence < 0:
                    yield self._event("response.created", response={**self.response, "output": []})
                    yield self._event("response.in_progress", response={**self.response, "output": []})
                for each in self._of(event):
                    yield each
        yield self._event(f"response.{self.response['status']}", response=self.response)

    def failure(self, error: ApiError) -> Event:
        """The last event of an answer that failed."""
        told = error_body(error)["error"]
        response = {**self.response, "status": "failed"}
        response["error"] = {"code": told["code"] or "server_error", "message": told["message"]}
        return self._event("response.failed", response=response)

    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation, for one that follows."""
        found: dict[str, Any] = {"role": "assistant", "content": ""}
        for item in self._items:
            if item["type"] == "message":
                found["content"] += item["content"][0]["text"]
            elif item["type"] == "reasoning":
                found["reasoning_content"] = item["content"][0]["text"]
            else:
                name = whole_name(item.get("namespace"), item["name"])
                call = call_of(item["call_id"], name, item["arguments"], "previous_response_id")
                found.setdefault("tool_calls", []).append(call)
        return found

    # ------------------------------------------------------------------ events

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **fields}

    def _of(self, event: MessageEvent) -> list[Event]:
        if isinstance(event, MessageEnd):
            closed = self._close()
            self._finish(event)
            return closed
        if isinstance(event, ToolCallMade):
            return [*self._close(), *self._call(event)]
        if isinstance(event, ThoughtDelta):
            opened = self._open("reasoning", "rs_", {"summary": []}, {"type": "reasoning_text", "text": ""})
            return [*opened, self._delta("response.reasoning_text.delta", event.text)]
        assert isinstance(event, TextDelta)
        logprobs = [
            {**chance(each.chosen), "top_logprobs": [chance(other) for other in each.likeliest]}
            for each in event.tokens
        ]
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        opened = self._open("message", "msg_", {"role": "assistant"}, part)
        self._items[-1]["content"][0]["logprobs"] += logprobs
        return [*opened, self._delta("response.output_text.delta", event.text, logprobs=logprobs)]

    def _open(self, kind: str, prefix: str, fields: dict[str, Any], part: dict[str, Any]) -> list[Event]:
        if self._items and self._items[-1]["type"] == kind and self._items[-1]["status"] == "in_progress":
            return []
        closed = self._close()
        item = {"type": kind, "id": new_id(prefix), "status": "in_progress", **fields, "content": [part]}
        self._items.append(item)
        place = len(self._items) - 1
        added = self._event("response.output_item.added", output_index=place, item={**item, "content": []})
        return [*closed, added, self._event("response.content_part.added", **self._place(), part=dict(part))]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _delta(self, kind: str, text: str, **fields: Any) -> Event:
        self._items[-1]["content"][0]["text"] += text
        return self._event(kind, **self._place(), delta=text, **fields)

    def _close(self) -> list[Event]:
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item = self._items[-1]
        item["status"] = "completed"
        part = item["content"][0]
        kind, extra = "reasoning_text", {}
        if item["type"] == "message":
            kind, extra = "output_text", {"logprobs": part["logprobs"]}
        return [
            self._event(f"response.{kind}.done", **self._place(), text=part["text"], **extra),
            self._event("response.content_part.done", **self._place(), part=part),
            self._event("response.output_item.done", output_index=len(self._items) - 1, item=item),
        ]

    def _call(self, event: ToolCallMade) -> list[Event]:
        space, name = self._namespaces.get(event.name, ("", event.name))
        item = {
            "type": "function_call",
            "id": new_id("fc_"),
            "call_id": event.call_id,
            **({"namespace": space} if space else {}),
            "name": name,
            "arguments": event.arguments,
            "status": "completed",
        }
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        begun = {**item, "arguments": "", "status": "in_progress"}
        arguments = {**place, "name": name, "arguments": event.arguments}
        return [
            self._event("response.output_item.added", output_index=place["output_index"], item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=event.arguments),
            self._event("response.function_call_arguments.done", **arguments),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _finish(self, end: MessageEnd) -> None:
        run = self._run
        self.response["status"] = "incomplete" if end.reason == "length" else "completed"
        if end.reason == "length":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            if self._items:
                self._items[-1]["status"] = "incomplete"
        self.response["usage"] = {
            "input_tokens": run.prompt_tokens,
            "input_tokens_details": {"cached_tokens": run.cached_tokens},
            "output_tokens": run.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": run.prompt_tokens + run.generated_tokens,
        }
