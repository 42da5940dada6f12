"""Errors as answers, in the words of the protocol that a path belongs to."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from swarmkit.api.dialects.messages import error_body as anthropic_body
from swarmkit.api.dialects.openai_parts import error_body
from swarmkit.api.refusals import ApiError, from_failure
from swarmkit.api.streams import ClientGoneError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def refusal(error: ApiError, path: str) -> Response:
    """The answer for an error."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(_body_for(path)(error), error.status, headers)


def _body_for(path: str) -> Callable[[ApiError], dict[str, Any]]:
    return anthropic_body if path.startswith("/v1/messages") else error_body


def handle_errors(app: FastAPI) -> None:
    """Answer every error in the words of the protocol."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return refusal(error, request.url.path)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return refusal(_of_validation(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # FastAPI's own, for what failed while it read the body
            return refusal(error.__cause__, request.url.path)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        told = ApiError(error.status_code, str(error.detail), code=code)
        answer = refusal(told, request.url.path)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        told = note_failure(error)
        return refusal(told, request.url.path)


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


async def told(work: Awaitable[T]) -> T:
    """The result of work, whose errors become what clients are told."""
    try:
        return await work
    except (ApiError, ClientGoneError):
        raise
    except Exception as error:
        raise note_failure(error) from error
