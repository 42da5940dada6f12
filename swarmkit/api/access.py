"""What stands before every endpoint: the size of bodies, the name of the host, and keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.datastructures import Headers

from swarmkit.api.refusals import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Refuse = Callable[[ApiError, str], Asgi]
Count = Callable[[str, int], object]

_OPEN_PATHS = ("/healthz",)
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "testserver")


class Keys:
    """The keys with which clients may use the server; anybody may if there are none."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys if key]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Headers) -> None:
        """Look for a key as `Authorization: Bearer …` or `x-api-key: …`.

        Raises:
            ApiError: there is none, or a wrong one.
        """
        if not self._digests:
            return
        given = given_key(headers)
        if not given:
            message = "give an API key, as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise ApiError(401, message, code="missing_api_key")
        digest = _digest(given)
        # every key is compared, so that the time does not tell which one is alike
        if not any([hmac.compare_digest(digest, each) for each in self._digests]):
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")


def given_key(headers: Headers) -> str:
    """The key of a request; empty if there is none."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Gate:
    """The middleware that checks a request before anything is read or computed for it."""

    def __init__(
        self, app: Asgi, *, keys: Keys, max_body_bytes: int, local_only: bool, refuse: Refuse, count: Count
    ) -> None:
        """Stand before an application.

        Args:
            local_only: answer only requests for a name of this computer, so that no page in a browser can
                reach the server under a name of its own.
            refuse: words an error for a path.
            count: told of each answer, with the path of its endpoint and its status.
        """
        self._app = app
        self._keys = keys
        self._most = max_body_bytes
        self._local_only = local_only
        self._refuse = refuse
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._count(getattr(route, "path", "other"), message["status"])
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._bounded(receive), counted)
        except ApiError as error:
            await self._refuse(error, scope["path"])(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self._local_only and name not in _LOOPBACK:
            raise ApiError(
                403,
                f"this server answers requests for localhost only, and not for {name!r}; "
                "start it with API keys to let it answer under other names",
                code="unknown_host",
            )
        if scope["path"] not in _OPEN_PATHS:
            self._keys.check(headers)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        taken = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request may have {self._most} bytes at most", code="request_too_large")
