"""Listening for requests of the control API, on a Unix socket or on loopback."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import uvicorn

from swarmkit.http_server import QuietServer
from swarmkit.worker.control.access import UNIX_HOST
from swarmkit.worker.control.app import Controls, control_app
from swarmkit.worker.control.handle import Handle
from swarmkit.worker.places import WorkerPlaces

_STARTS_WITHIN_S = 10.0
_MOST_CONNECTIONS = 64
_KEEP_CONNECTION_S = 60
"""How long a connection without requests is kept: longer than a tray waits before it renews its lease."""


@asynccontextmanager
async def listening(
    controls: Controls, places: WorkerPlaces, *, loopback: bool = False
) -> AsyncIterator[Handle]:
    """Serve the control API inside the block, and tell the person's programs where.

    Args: loopback: listen there also where there are Unix sockets, for programs outside of this system.
    """
    token = secrets.token_urlsafe(32)
    path = None if loopback else places.socket
    with _bound(path) as bound:
        if path is not None:
            handle = Handle(token=token, pid=os.getpid(), socket=str(path))
            hosts = {UNIX_HOST}
        else:
            port = bound.getsockname()[1]
            handle = Handle(token=token, pid=os.getpid(), port=port)
            hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        config = uvicorn.Config(
            control_app(controls, token, hosts),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_keep_alive=_KEEP_CONNECTION_S,
            timeout_graceful_shutdown=1,
        )
        server = QuietServer(config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [bound])
            with anyio.fail_after(_STARTS_WITHIN_S):
                while not server.started:  # noqa: ASYNC110 - uvicorn has nothing else to wait for
                    await anyio.sleep(0.005)
            handle.write(places.handle)
            try:
                yield handle
            finally:
                places.handle.unlink(missing_ok=True)
                server.should_exit = True
        if path is not None:
            path.unlink(missing_ok=True)


def _bound(path: os.PathLike[str] | None) -> socket.socket:
    """A socket that listens; the one with a path belongs to this person alone."""
    if path is None:
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        bound.bind(("127.0.0.1", 0))
    else:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if os.path.lexists(path):
            os.unlink(path)  # noqa: PTH108 - left behind by a worker that was killed: the lock is ours
        before = os.umask(0o177)
        try:
            bound.bind(os.fspath(path))
        finally:
            os.umask(before)
    bound.listen(64)
    return bound
