"""The application behind a socket: in a process of its own, or beside other code on its event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from swarmkit.errors import TransportError
from swarmkit.http_server import QuietServer

_MOST_CONNECTIONS = 2048
_SHUTDOWN_TIMEOUT_S = 5


@dataclass(frozen=True)
class ApiAddress:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The beginning of every URL of the server, such as `http://127.0.0.1:8000`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@asynccontextmanager
async def serving(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[ApiAddress]:
    """Serve an application on the running event loop until the block is left.

    Example::

        async with serving(create_app(model)) as address:
            print(address.url)

    Args: port: 0 = any free one.

    Raises:
        TransportError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise TransportError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT_S,
            server_header=False,
        )
        server = QuietServer(config)
        running = asyncio.create_task(server.serve([listening]))
        try:
            await _started(server, running)
            yield ApiAddress(host, listening.getsockname()[1])
        finally:
            server.should_exit = True
            await running
    finally:
        listening.close()


async def _started(server: uvicorn.Server, running: asyncio.Task[None]) -> None:
    while not server.started:
        if running.done():
            await running
            raise TransportError("the HTTP server ended before it had started; its log has the reason")
        await asyncio.sleep(0.01)
