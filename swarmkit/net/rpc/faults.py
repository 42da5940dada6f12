"""Errors become faults on the wire here, and faults become errors again; nowhere else."""

from __future__ import annotations

import logging

from swarmkit.errors import (
    IllegalMessageError,
    MessageTooLargeError,
    PeerError,
    ProtocolError,
    RemoteError,
    SwarmkitError,
)
from swarmkit.net.protocol.messages import Fault, FaultCode, printable

logger = logging.getLogger(__name__)

_MAX_TEXT = 2000


class Refusal(SwarmkitError):
    """A request is answered with a fault instead of a result.

    Attributes:
        code: tells programs why.
        retry_after_s: when a busy server expects to have room, in seconds; 0 = it does not say.
    """

    def __init__(self, code: FaultCode, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code: FaultCode = code
        self.retry_after_s = retry_after_s


def refusal_of(error: Exception, too_large: FaultCode = "too_large") -> Refusal:
    """How a request is refused whose handling raised `error`.

    Args:
        too_large: the code for a message with more bytes than the endpoint takes.

    Raises:
        PeerError, TimeoutError: the peer is gone or does not take its answers, so it cannot be told.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, IllegalMessageError):
        return Refusal("illegal_message", str(error))
    if isinstance(error, MessageTooLargeError):
        return Refusal(too_large, str(error))
    if isinstance(error, ProtocolError):
        return Refusal("bad_message", str(error))
    if isinstance(error, PeerError | TimeoutError):
        try:
            raise error
        finally:
            # Its traceback has this frame now. If this frame had the error, too, neither would be let go, nor
            # what the frames between hold, such as a session's cache, until Python looks for garbage.
            del error
    logger.error("a request failed on this server", exc_info=error)
    return Refusal("internal", f"the request failed on the server: {type(error).__name__}: {error}")


def fault_of(refusal: Refusal, number: int = 0) -> Fault:
    """The message that tells a peer of a refusal; `number` is the refused step's, 0 = the last message."""
    text = printable(str(refusal))[:_MAX_TEXT]  # it may quote what the peer sent
    return Fault(refusal.code, text, number, refusal.retry_after_s)


def error_of(fault: Fault, peer_id: str) -> RemoteError:
    """The error that a peer's fault is on the side that asked."""
    return RemoteError(fault.message, peer_id, fault.code, fault.retry_after_s)
