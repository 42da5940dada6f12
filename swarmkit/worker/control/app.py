"""The control API's requests, as an ASGI application over whatever implements `Controls`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from swarmkit.errors import SwarmkitError, UsageError
from swarmkit.worker.control.access import MAX_BODY_BYTES, refused
from swarmkit.worker.control.values import (
    Belongings,
    Day,
    LeaseGranted,
    LeaseRequest,
    Stats,
    Status,
)
from swarmkit.worker.pause import PauseRequest
from swarmkit.worker.settings import WorkerSettings, settings_schema

T = TypeVar("T")

_MOST_DAYS = 3660
_MOST_LINES = 5000


class ConflictError(UsageError):
    """Somebody else has what was asked for."""


class Controls(Protocol):
    """What the requests do. Called on the event loop."""

    @property
    def settings(self) -> WorkerSettings:
        """What the person has chosen."""

    def status(self) -> Status:
        """What the worker does, and why."""

    def change_settings(self, changes: dict[str, Any]) -> WorkerSettings:
        """Replace some settings. Raises: UsageError, OSError."""

    def pause(self, request: PauseRequest) -> None:
        """Pause. Raises: UsageError: such a pause would never begin, or never end."""

    def resume(self) -> None:
        """End the person's own pause."""

    def stop(self) -> None:
        """End the worker."""

    def stats(self) -> Stats:
        """What was contributed."""

    def history(self, days: int) -> list[Day]:
        """What was contributed on each of the last days."""

    def log(self, lines: int) -> list[str]:
        """The last lines of the log."""

    def renew_lease(self, request: LeaseRequest) -> LeaseGranted:
        """Take note of a tray. Raises: ConflictError: another one holds the lease."""

    def release_lease(self, holder: str) -> None:
        """The tray ends."""

    def belongings(self) -> Belongings:
        """What the worker has put on this computer. Called in a thread."""

    def events_as_lines(self) -> AsyncIterator[bytes]:
        """What happens, as lines of JSON."""


def control_app(controls: Controls, token: str, hosts: Collection[str]) -> ASGIApp:
    """Return the application.

    Args:
        token: what each request has to bring.
        hosts: what `Host` may say.
    """
    requests = _Requests(controls)
    routes = [
        Route("/v1/status", requests.status),
        Route("/v1/settings", requests.settings),
        Route("/v1/settings", requests.change_settings, methods=["PATCH"]),
        Route("/v1/settings/schema", requests.schema),
        Route("/v1/pause", requests.pause, methods=["POST"]),
        Route("/v1/resume", requests.resume, methods=["POST"]),
        Route("/v1/stop", requests.stop, methods=["POST"]),
        Route("/v1/stats", requests.stats),
        Route("/v1/history", requests.history),
        Route("/v1/log", requests.log),
        Route("/v1/lease", requests.renew_lease, methods=["POST"]),
        Route("/v1/lease", requests.release_lease, methods=["DELETE"]),
        Route("/v1/belongings", requests.belongings),
        Route("/v1/events", requests.events),
    ]
    app = Starlette(routes=routes, exception_handlers={404: _unknown, 405: _unknown})
    return _Guarded(app, token, hosts)


class _Guarded:
    """Refuses everything that is not from a program of the same person."""

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str]) -> None:
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are neither websockets nor a lifespan here
            return
        refusal = refused(scope["method"], scope["headers"], token=self._token, hosts=self._hosts)
        if refusal is not None:
            await _answer({"error": refusal.why}, refusal.status)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _TooLargeError(UsageError):
    """More came than a body may have, in chunks without a length."""


def _answers(
    act: Callable[[_Requests, Request], Awaitable[Any]],
) -> Callable[[_Requests, Request], Awaitable[Response]]:
    """Turn what a request returns into JSON, and what it raises into an error with a sentence."""

    async def answer(self: _Requests, request: Request) -> Response:
        try:
            value = await act(self, request)
        except ConflictError as error:
            return _answer({"error": str(error)}, 409)
        except _TooLargeError as error:
            return _answer({"error": str(error)}, 413)
        except SwarmkitError as error:
            return _answer({"error": str(error)}, 400)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _answer({"error": f"{where}{error.strerror or error}"}, 507)
        return value if isinstance(value, Response) else _answer(value, 200)

    return answer


class _Requests:
    def __init__(self, controls: Controls) -> None:
        self._controls = controls

    @_answers
    async def status(self, request: Request) -> Status:
        return self._controls.status()

    @_answers
    async def settings(self, request: Request) -> WorkerSettings:
        return self._controls.settings

    @_answers
    async def schema(self, request: Request) -> dict[str, Any]:
        return settings_schema()

    @_answers
    async def change_settings(self, request: Request) -> WorkerSettings:
        return self._controls.change_settings(await _body(request, dict[str, Any]))

    @_answers
    async def pause(self, request: Request) -> Status:
        self._controls.pause(await _body(request, PauseRequest))
        return self._controls.status()

    @_answers
    async def resume(self, request: Request) -> Status:
        self._controls.resume()
        return self._controls.status()

    @_answers
    async def stop(self, request: Request) -> dict[str, Any]:
        self._controls.stop()
        return {}

    @_answers
    async def stats(self, request: Request) -> Stats:
        return self._controls.stats()

    @_answers
    async def history(self, request: Request) -> list[Day]:
        return self._controls.history(_number(request, "days", 30, _MOST_DAYS))

    @_answers
    async def log(self, request: Request) -> list[str]:
        return self._controls.log(_number(request, "lines", 200, _MOST_LINES))

    @_answers
    async def renew_lease(self, request: Request) -> LeaseGranted:
        return self._controls.renew_lease(await _body(request, LeaseRequest))

    @_answers
    async def release_lease(self, request: Request) -> dict[str, Any]:
        self._controls.release_lease(request.query_params.get("holder", ""))
        return {}

    @_answers
    async def belongings(self, request: Request) -> Belongings:
        return await anyio.to_thread.run_sync(self._controls.belongings)

    @_answers
    async def events(self, request: Request) -> Response:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return StreamingResponse(
            self._controls.events_as_lines(), media_type="application/x-ndjson", headers=headers
        )


def _answer(value: Any, status: int) -> Response:
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(msgspec.json.encode(value), status, headers, "application/json")


async def _body(request: Request, kind: type[T]) -> T:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise _TooLargeError(f"the body may have {MAX_BODY_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{error}.") from error


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= most:
        raise UsageError(f"{name} has to be a number from 1 to {most}, not {text[:20]!r}")
    return int(text)


async def _unknown(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _answer({"error": f"there is no {request.method} {request.url.path}; see docs/worker.md"}, status)
