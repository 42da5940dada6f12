"""Answers over HTTP: server-sent events, and whole ones, both of which end when the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from swarmkit.api.refusals import ApiError
from swarmkit.errors import SwarmkitError

T = TypeVar("T")


class ClientGoneError(SwarmkitError):
    """The client closed its connection; there is nobody to answer."""


def event(data: dict[str, Any] | str, name: str | None = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, and cancel it as soon as the client closes its connection.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventResponse(StreamingResponse):
    """A stream of server-sent events, which ends at its source when the client is gone."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def streamed(
    request: Request,
    events: AsyncGenerator[bytes, None],
    on_error: Callable[[ApiError], bytes],
    note_failure: Callable[[Exception], ApiError],
) -> StreamingResponse:
    """A response that streams events; returned when the first is there, so that an error before has a status.

    Raises: what the events raise before the first one.
    """
    try:
        first = await unless_gone(request, _first(events))
    except BaseException:
        await events.aclose()
        raise

    async def all_events() -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            yield first
            try:
                async for each in events:
                    yield each
            except Exception as error:  # noqa: BLE001 - the status was sent: the error is told in the stream
                yield on_error(note_failure(error))

    return EventResponse(all_events())


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events, b"")
