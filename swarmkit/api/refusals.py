"""Requests that the API refuses, with the parameter that is at fault, before a dialect words them."""

from __future__ import annotations

from swarmkit.errors import (
    DeadlineError,
    NoRouteError,
    PeerError,
    RemoteError,
    SessionError,
    SwarmkitError,
    TransportError,
    UsageError,
)


class ApiError(SwarmkitError):
    """A request that gets an error as its answer.

    Attributes:
        status: the HTTP status.
        param: the parameter at fault, as a path such as `messages[0].content`; None if there is none.
        code: a word for programs.
        retry_after_s: when the client may try again; None if that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """The error for a parameter with a value that cannot be."""
    return ApiError(400, message, param=param, code=code)


def text_only(param: str, what: str) -> ApiError:
    """The error for content that is no text."""
    return invalid(
        param, f"this server runs a text model and cannot take {what}; send text only", "unsupported_content"
    )


def from_failure(error: Exception) -> ApiError:
    """What a client is told of an error of the swarm."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NoRouteError):
        return ApiError(503, f"the swarm cannot run the model now: {error}", code="no_route", retry_after_s=5)
    if isinstance(error, RemoteError) and error.is_busy:
        seconds = max(1.0, error.retry_after_s)
        return ApiError(503, f"the swarm has no room now: {error}", code="busy", retry_after_s=seconds)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), code="deadline", retry_after_s=1)
    if isinstance(error, SessionError):
        return invalid("messages", str(error), "context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, PeerError | TransportError):
        return ApiError(503, f"the swarm failed: {error}", code="swarm_failed", retry_after_s=1)
    return ApiError(500, "an internal error; the log of the server has the details", code="internal_error")
