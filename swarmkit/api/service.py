"""What the endpoints work with."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swarmkit.api.conversation import ChatModel
from swarmkit.api.engine import AnswerEngine
from swarmkit.api.error_answers import note_failure, told
from swarmkit.api.metrics import ApiMetrics
from swarmkit.api.refusals import ApiError
from swarmkit.api.streams import streamed, unless_gone
from swarmkit.api.turns import Turns
from swarmkit.clock import Clock
from swarmkit.settings import ApiSettings


@dataclass
class ApiService:
    """What the endpoints work with."""

    engine: AnswerEngine
    chat: ChatModel
    turns: Turns
    metrics: ApiMetrics
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

    async def respond(self, request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
        """Answer with the result of work, when it is the request's turn; work ends when the client is gone.

        Raises:
            ApiError: the work failed, or too many requests wait.
        """

        async def in_turn() -> dict[str, Any]:
            try:
                async with self.turns.turn():
                    return await work
            finally:
                work.close()

        return JSONResponse(await told(unless_gone(request, in_turn())))

    async def stream(
        self,
        request: Request,
        events: AsyncGenerator[bytes, None],
        on_error: Callable[[ApiError], bytes],
    ) -> Response:
        """Answer with server-sent events, when it is the request's turn; they end when the client is gone.

        Args: on_error: words an error that comes after the first event.

        Raises:
            ApiError: the first event failed, or too many requests wait.
        """

        async def in_turn() -> AsyncGenerator[bytes, None]:
            async with self.turns.turn(), aclosing(events):
                async for each in events:
                    yield each

        return await told(streamed(request, in_turn(), on_error, note_failure))
