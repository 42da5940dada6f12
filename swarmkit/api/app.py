"""The application: endpoints, and what they share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.responses import Response

from swarmkit._version import __version__
from swarmkit.api.access import Gate, Keys
from swarmkit.api.conversation import ChatModel
from swarmkit.api.dialects.chat_completions import ChatCompletionForm, ChatRequest
from swarmkit.api.dialects.completions import CompletionForm, CompletionRequest
from swarmkit.api.dialects.openai_parts import error_body
from swarmkit.api.engine import AnswerEngine
from swarmkit.api.error_answers import handle_errors, refusal
from swarmkit.api.metrics import ApiMetrics
from swarmkit.api.monitor import add_models, add_monitor
from swarmkit.api.service import ApiService
from swarmkit.api.streams import event
from swarmkit.api.turns import Turns
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.settings import ApiSettings

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM

logger = logging.getLogger(__name__)

_COUNT_PERIOD_S = 5.0


def create_app(
    model: SwarmModelForCausalLM,
    *,
    name: str | None = None,
    aliases: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    local_only: bool = False,
    settings: ApiSettings | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> FastAPI:
    """Make an ASGI application that answers with a model; the model is the caller's, and stays open.

    Args:
        name: what clients call the model; the checkpoint's name if not given.
        aliases: other names under which it answers too.
        api_keys: with any of which clients may use the server; without any, everybody may.
        local_only: answer requests for `localhost` only, as a server without keys on loopback should.
    """
    settings = settings or ApiSettings()
    turns = Turns(settings.max_running, settings.max_waiting)
    metrics = ApiMetrics(model, lambda: turns.running, lambda: turns.waiting)
    engine = AnswerEngine(model, settings.max_running, metrics, clock)
    service = ApiService(
        engine=engine,
        chat=ChatModel(engine, settings.max_tokens),
        turns=turns,
        metrics=metrics,
        settings=settings,
        clock=clock,
        names=(name or model.connection.client.model.name, *aliases),
        started=int(clock.time()),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        counting = asyncio.create_task(_count_events(metrics))
        try:
            yield
        finally:
            counting.cancel()
            metrics.close()
            engine.close()

    app = FastAPI(
        title="swarmkit",
        summary="A language model of a swarm, by OpenAI's and Anthropic's protocols.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # whose page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(
        Gate,  # type: ignore[arg-type]
        keys=Keys(api_keys),
        max_body_bytes=settings.max_body_bytes,
        local_only=local_only,
        refuse=refusal,
        count=lambda path, status: metrics.requests.labels(path, str(status)).inc(),
    )
    handle_errors(app)
    _add_openai(app, service)
    add_models(app, service)
    add_monitor(app, service)
    return app


async def _count_events(metrics: ApiMetrics) -> None:
    """Take events now and then, so that none is dropped where nobody asks for metrics."""
    while True:
        await asyncio.sleep(_COUNT_PERIOD_S)
        metrics.take_events()


# ---------------------------------------------------------------------- endpoints


def _add_openai(app: FastAPI, service: ApiService) -> None:
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
        """Continue a conversation."""
        service.check_model(body.model)
        wish = body.wish(service.engine.model.config.vocab_size)
        run = await service.engine.in_thread(service.chat.prepare, wish)
        form = ChatCompletionForm(body, service.model_name, int(service.clock.time()), run)
        return await respond(request, form, body.stream)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        service.check_model(body.model)
        wanted = await service.engine.in_thread(body.requests, service.engine, service.settings.max_tokens)
        form = CompletionForm(body, service.model_name, int(service.clock.time()), service.engine, wanted)
        return await respond(request, form, body.stream)
