"""The endpoints of the protocols."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from swarmkit.api.access import given_key
from swarmkit.api.conversation import ChatRun, ChatWish
from swarmkit.api.dialects import messages as anthropic
from swarmkit.api.dialects.chat_completions import ChatCompletionForm, ChatRequest
from swarmkit.api.dialects.completions import CompletionForm, CompletionRequest
from swarmkit.api.dialects.messages import CountRequest, MessageForm, MessagesRequest
from swarmkit.api.dialects.openai_parts import error_body
from swarmkit.api.dialects.response_form import ResponseForm
from swarmkit.api.dialects.responses import ResponsesRequest
from swarmkit.api.refusals import ApiError
from swarmkit.api.response_store import ResponseStore
from swarmkit.api.service import ApiService
from swarmkit.api.streams import event


def add_endpoints(app: FastAPI, service: ApiService) -> None:
    """Add all protocols."""
    _add_completions(app, service)
    _add_messages(app, service)
    _add_responses(app, service)


async def _prepared(service: ApiService, wish: ChatWish) -> ChatRun:
    run: ChatRun = await service.engine.in_thread(service.chat.prepare, wish)
    return run


def _add_completions(app: FastAPI, service: ApiService) -> None:
    async def respond(
        request: Request, form: ChatCompletionForm | CompletionForm, stream: bool | None
    ) -> Response:
        if not stream:
            return await service.respond(request, form.whole())

        async def events() -> AsyncGenerator[bytes, None]:
            async with aclosing(form.chunks()) as chunks:
                async for chunk in chunks:
                    yield event(chunk)
            yield event("[DONE]")

        return await service.stream(request, events(), lambda error: event(error_body(error)))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation (OpenAI's chat completions)."""
        service.check_model(body.model)
        run = await _prepared(service, body.wish(service.engine.model.config.vocab_size))
        form = ChatCompletionForm(body, service.model_name, int(service.clock.time()), run)
        return await respond(request, form, body.stream)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text (OpenAI's completions)."""
        service.check_model(body.model)
        wanted = await service.engine.in_thread(body.requests, service.engine, service.settings.max_tokens)
        form = CompletionForm(body, service.model_name, int(service.clock.time()), service.engine, wanted)
        return await respond(request, form, body.stream)


def _add_messages(app: FastAPI, service: ApiService) -> None:
    @app.post("/v1/messages")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Continue a conversation (Anthropic's messages)."""
        service.check_model(body.model)
        form = MessageForm(service.model_name, await _prepared(service, body.wish()))
        if not body.stream:
            return await service.respond(request, form.whole())

        async def events() -> AsyncGenerator[bytes, None]:
            async with aclosing(form.events()) as told:
                async for name, data in told:
                    yield event({"type": name, **data}, name)

        def on_error(error: ApiError) -> bytes:
            return event(anthropic.error_body(error), "error")

        return await service.stream(request, events(), on_error)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        """Count the tokens of a conversation, without an answer."""
        service.check_model(body.model)
        return {"input_tokens": (await _prepared(service, body.wish())).prompt_tokens}


def _add_responses(app: FastAPI, service: ApiService) -> None:
    store = ResponseStore(service.settings.max_stored_bytes)

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Continue a conversation (OpenAI's responses)."""
        service.check_model(body.model)
        owner = _owner(request)
        before: list[dict[str, Any]] = []
        if body.previous_response_id is not None:
            before = store.get(owner, body.previous_response_id, "previous_response_id").messages
        run = await _prepared(service, body.wish(before))
        form = ResponseForm(body, service.model_name, int(service.clock.time()), run)

        def keep() -> None:
            if body.store is not False:
                store.keep(owner, form.response, [*before, *body.messages(), form.message()])

        if not body.stream:

            async def whole() -> dict[str, Any]:
                found = await form.whole()
                keep()
                return found

            return await service.respond(request, whole())

        async def events() -> AsyncGenerator[bytes, None]:
            async with aclosing(form.events()) as told:
                async for each in told:
                    if each["type"] in ("response.completed", "response.incomplete"):
                        keep()
                    yield event(each, each["type"])

        def on_error(error: ApiError) -> bytes:
            failed = form.failure(error)
            return event(failed, failed["type"])

        return await service.stream(request, events(), on_error)

    @app.get("/v1/responses/{name}")
    async def response_named(name: str, request: Request) -> Response:
        """A response that the server remembers."""
        return JSONResponse(store.get(_owner(request), name).response)

    @app.delete("/v1/responses/{name}")
    async def forget_response(name: str, request: Request) -> dict[str, Any]:
        """Have the server forget a response."""
        store.forget(_owner(request), name)
        return {"id": name, "object": "response", "deleted": True}


def _owner(request: Request) -> str:
    """Whose responses a request may see: those made with the same key."""
    return hashlib.sha256(given_key(request.headers).encode()).hexdigest()
