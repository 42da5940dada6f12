"""The tray's pages: dashboard, settings, first steps and log, for this person's browser alone.

The pages are files beside this module, and ask for values under `/api/`, which are passed on to the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from swarmkit.clock import SYSTEM_CLOCK
from swarmkit.errors import SwarmkitError, UsageError
from swarmkit.http_server import QuietServer
from swarmkit.worker import autostart
from swarmkit.worker.control.client import WorkerClient
from swarmkit.worker.control.handle import NoWorkerError
from swarmkit.worker.places import WorkerPlaces
from swarmkit_app.tray import computer
from swarmkit_app.tray.face import Shape
from swarmkit_app.tray.icons import icon
from swarmkit_app.tray.page_access import COOKIE, PageKeys, refusal, wrong_host

T = TypeVar("T")

_STATIC = Path(__file__).parent / "static"
_STARTS_WITHIN_S = 10.0
_MOST_BODY_BYTES = 64 * 1024
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class TrayPages:
    """Serves the pages on loopback inside `with`.

    Args:
        start_worker: starts a worker where none runs.
    """

    def __init__(self, client: WorkerClient, places: WorkerPlaces, start_worker: Callable[[], None]) -> None:
        self._keys = PageKeys()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        requests = _PageRequests(client, places, start_worker)
        self._server = _PageServer(
            uvicorn.Config(
                pages_app(requests, self._keys, self.port),
                http="h11", ws="none", lifespan="off", log_config=None, log_level="critical",
                access_log=False, proxy_headers=False, server_header=False, date_header=False,
                limit_concurrency=64,
                timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._serve, name="swarmkit-pages", daemon=True)

    def link(self, page: str = "dashboard") -> str:
        """Return an address that opens a page in a browser, once, within a minute."""
        query = urlencode({"key": self._keys.new(), "page": page})
        return f"http://127.0.0.1:{self.port}/open?{query}"

    def __enter__(self) -> TrayPages:
        self._socket.listen(64)
        self._thread.start()
        if not self._server.is_up.wait(_STARTS_WITHIN_S):
            raise UsageError("the tray's pages could not be served on 127.0.0.1")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.end()
        self._thread.join(10.0)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


class _PageServer(QuietServer):
    """A server that tells other threads when it is up, and that costs nothing while nobody asks it.

    uvicorn looks ten times a second whether it is to end, which would be more than all else that a tray does.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = asyncio.Event()

    def end(self) -> None:
        """End it, from any thread."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._told.set)

    async def main_loop(self) -> None:
        """Wait until it is to end."""
        self._loop = asyncio.get_running_loop()
        if not await self.on_tick(0):  # which also prepares the headers of all answers
            await self._told.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


def pages_app(requests: _PageRequests, keys: PageKeys, port: int) -> ASGIApp:
    """Return the pages as an ASGI application."""

    async def open_page(request: Request) -> Response:
        if not keys.use(request.query_params.get("key", "")):
            return PlainTextResponse(
                "This link has been used, or is older than a minute. Open the page from the tray's menu, "
                "or with `swarmkit tray --open`.\n",
                403,
            )
        page = request.query_params.get("page", "dashboard")
        answer = RedirectResponse(f"/#{page}" if page.isalpha() else "/", 303)
        answer.set_cookie(COOKIE, keys.cookie, httponly=True, samesite="strict")
        return answer

    routes = [
        Route("/open", open_page),
        Route("/", lambda _: FileResponse(_STATIC / "index.html")),
        Route("/icon.png", lambda _: Response(_png("serving"), media_type="image/png")),
        Mount("/static", StaticFiles(directory=_STATIC)),
        Mount("/api", routes=requests.routes()),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_PageGuard, keys=keys, port=port)])


def _png(shape: Shape) -> bytes:
    """The icon as a file."""
    data = BytesIO()
    icon(shape).save(data, "PNG")
    return data.getvalue()


class _PageGuard:
    """Refuses everything but what this person's browser asks for."""

    def __init__(self, app: ASGIApp, keys: PageKeys, port: int) -> None:
        self._app, self._keys, self._port = app, keys, port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        if scope["path"] == "/open":
            why = "the request is for another host" if wrong_host(request.headers, self._port) else ""
        else:
            cookie = request.cookies.get(COOKIE)
            why = refusal(scope["method"], request.headers, cookie, self._keys, self._port)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if why:
            await JSONResponse({"error": f"{why}."}, 403)(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)


class _PageRequests:
    """What the pages ask for. Each answer of the worker is passed on as it is."""

    def __init__(self, client: WorkerClient, places: WorkerPlaces, start_worker: Callable[[], None]) -> None:
        self._client, self._places, self._start_worker = client, places, start_worker

    def routes(self) -> list[Route]:
        client = self._client
        return [
            Route("/status", _answer(lambda _: client.status())),
            Route("/stats", _answer(lambda _: client.stats())),
            Route("/history", _answer(lambda _: client.history(30))),
            Route("/log", _answer(lambda _: client.log(300))),
            Route("/belongings", _answer(lambda _: client.belongings())),
            Route("/schema", _answer(lambda _: client.settings_schema())),
            Route("/settings", _answer(lambda _: client.settings())),
            Route("/settings", _answer(client.change_settings), methods=["PATCH"]),
            Route("/pause", _answer(self._pause), methods=["POST"]),
            Route("/resume", _answer(lambda _: client.resume()), methods=["POST"]),
            Route("/start", _answer(self._start), methods=["POST"]),
            Route("/autostart", _answer(lambda _: {"on": autostart.is_on()})),
            Route("/autostart", _answer(self._switch), methods=["POST"]),
            Route("/programs", _answer(lambda _: computer.programs_that_run())),
            Route("/computer", _answer(lambda _: self._computer())),
            Route("/test", _answer(self._test), methods=["POST"]),
            Route("/invite", _answer(_about_invite), methods=["POST"]),
        ]

    def _pause(self, body: dict[str, Any]) -> Any:
        return self._client.pause(
            body.get("until", "resumed"), body.get("seconds"), body.get("haste", "prompt")
        )

    def _start(self, _: dict[str, Any]) -> Any:
        self._start_worker()
        return {}

    def _switch(self, body: dict[str, Any]) -> Any:
        try:
            autostart.switch(body.get("on") is True)
        except OSError as error:
            raise UsageError(f"the start at log-in cannot be changed: {error}.") from error
        return {"on": autostart.is_on()}

    def _computer(self) -> Any:
        folder = next(each for each in (self._places.weights, *self._places.weights.parents) if each.exists())
        found = computer.this_computer(str(folder))
        return {"computer": asdict(found), "suggested": computer.suggested(found)}

    def _test(self, body: dict[str, Any]) -> Any:
        device = body.get("device", "cpu")
        if not isinstance(device, str) or len(device) > 32:
            raise UsageError("the device has to be named, such as cpu or cuda:0.")
        return computer.measured(device)


def _about_invite(body: dict[str, Any]) -> Any:
    """What an invite link says, for the person who has been given it."""
    # It needs cryptography, which a tray need not keep in memory.
    from swarmkit.net.transport.invite import read_link

    link = read_link(str(body.get("link", "")), SYSTEM_CLOCK.time())
    return {"model": link.model, "private": bool(link.key), "expires_at": link.expires_at}


def _answer(work: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Any]:
    """Make a route of a function from a body to a value. It runs in a thread."""

    async def endpoint(request: Request) -> Response:
        body: Any = {}
        if request.method != "GET":
            data = bytearray()
            async for part in request.stream():
                data += part
                if len(data) > _MOST_BODY_BYTES:
                    return JSONResponse({"error": "the body is too large."}, 413)
            try:
                body = msgspec.json.decode(bytes(data) or b"{}")
            except (msgspec.DecodeError, RecursionError):
                body = None
            if not isinstance(body, dict):
                return JSONResponse({"error": "the body has to be a JSON object."}, 400)
        try:
            value = await run_in_threadpool(work, body)
        except NoWorkerError as error:
            return JSONResponse({"error": str(error), "no_worker": True}, 503)
        except SwarmkitError as error:
            return JSONResponse({"error": str(error)}, 400)
        return Response(msgspec.json.encode(value), media_type="application/json")

    return endpoint
