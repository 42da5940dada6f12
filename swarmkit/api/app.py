"""The application: endpoints, and what they share."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from swarmkit._version import __version__
from swarmkit.api.access import Gate, Keys
from swarmkit.api.conversation import ChatModel
from swarmkit.api.dialects.chat_completions import ChatCompletionForm, ChatRequest
from swarmkit.api.dialects.completions import CompletionForm, CompletionRequest
from swarmkit.api.dialects.openai_parts import error_body
from swarmkit.api.engine import AnswerEngine
from swarmkit.api.refusals import ApiError, from_failure
from swarmkit.api.streams import ClientGoneError, event, streamed, unless_gone
from swarmkit.api.turns import Turns
from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.settings import ApiSettings

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM

logger = logging.getLogger(__name__)


@dataclass
class ApiService:
    """What the endpoints work with."""

    engine: AnswerEngine
    chat: ChatModel
    turns: Turns
    settings: ApiSettings
    clock: Clock
    names: tuple[str, ...]
    started: int

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.names[0]

    def check_model(self, name: str) -> None:
        """Refuse requests for another model."""
        if name not in self.names:
            raise ApiError(
                404,
                f"this server has the model {self.model_name!r}, and not {name!r}",
                param="model",
                code="model_not_found",
            )


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
    engine = AnswerEngine(model, settings.max_running)
    service = ApiService(
        engine=engine,
        chat=ChatModel(engine, settings.max_tokens),
        turns=Turns(settings.max_running, settings.max_waiting),
        settings=settings,
        clock=clock,
        names=(name or model.connection.client.model.name, *aliases),
        started=int(clock.time()),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
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
        refuse=_refusal,
    )
    _handle_errors(app)
    _add_openai(app, service)
    _add_models(app, service)
    return app


# ---------------------------------------------------------------------- errors


def _refusal(error: ApiError, path: str) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(_body_for(path)(error), error.status, headers)


def _body_for(path: str) -> Callable[[ApiError], dict[str, Any]]:
    return error_body


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return _refusal(error, request.url.path)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return _refusal(_of_validation(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        told = ApiError(error.status_code, str(error.detail), code=code)
        answer = _refusal(told, request.url.path)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        told = note_failure(error)
        return _refusal(told, request.url.path)


def note_failure(error: Exception) -> ApiError:
    """What a client is told of an error, which is logged if it is none of ours."""
    told = from_failure(error)
    if told.status == 500:
        logger.error("a request failed", exc_info=error)
    return told


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    where = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json"
        )
    param = ""
    for part in where:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    message = f"{param or 'the body'}: {first['msg']}"
    return ApiError(400, message, param=param or None, code="invalid_value")


# ---------------------------------------------------------------------- endpoints


async def _guarded(turns: Turns, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """The same events, once it is the request's turn."""
    async with turns.turn():
        async for each in events:
            yield each


def _add_openai(app: FastAPI, service: ApiService) -> None:
    async def respond(
        request: Request, form: ChatCompletionForm | CompletionForm, stream: bool | None
    ) -> Response:
        if not stream:

            async def whole() -> dict[str, Any]:
                async with service.turns.turn():
                    return await form.whole()

            return JSONResponse(await _told(unless_gone(request, whole())))

        async def events() -> AsyncIterator[bytes]:
            async for chunk in _guarded(service.turns, form.chunks()):
                yield event(chunk)
            yield event("[DONE]")

        def on_error(error: ApiError) -> bytes:
            return event(error_body(error))

        return await _told(streamed(request, events(), on_error, note_failure))

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


async def _told(work: Any) -> Any:
    """The result of work, whose errors become what clients are told."""
    try:
        return await work
    except (ApiError, ClientGoneError):
        raise
    except Exception as error:
        raise note_failure(error) from error


def _add_models(app: FastAPI, service: ApiService) -> None:
    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "swarmkit",
            "max_model_len": service.engine.max_length,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model of this server, under each of its names."""
        return {"object": "list", "data": [described(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> dict[str, Any]:
        """One of the names."""
        service.check_model(name)
        return described(name)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}
