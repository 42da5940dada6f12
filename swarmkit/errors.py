"""The errors a caller can meet, drawn once.

::

    SwarmkitError
    ├── UsageError            the caller asked for something that cannot be; fix the call
    │   ├── ModelError        a checkpoint that is missing, incomplete or not supported
    │   ├── MemoryLimitError  not even one block of a model fits into the memory that is allowed
    │   ├── AdapterError      an adapter that does not fit the model, or is of a kind that is not supported
    │   └── SessionError      a session used after its end or beyond its length
    ├── TransportError        this machine's own networking could not start or has ended
    │   ├── DaemonStartError      the p2p daemon did not start; it carries a cause
    │   └── NoContactError        no other peer of the swarm answers
    ├── NoRouteError          no server has some blocks of the model
    ├── DeadlineError         a step took longer than the user allows
    └── PeerError             another peer is at fault; the library goes on without it where it can
        ├── PeerUnreachableError  it cannot be dialled, or the connection ended
        │   ├── NotServedError        it was reached, and does not serve what was asked for
        │   └── NotAdmittedError      it was reached, and deals only with other peers
        ├── PeerTimeoutError      it did not answer in time
        ├── ProtocolError         it sent something that is not allowed
        │   ├── IllegalMessageError   a message that is not allowed at this point of the conversation
        │   └── MessageTooLargeError  a message with more bytes than this side takes
        └── RemoteError           it answered with a fault, which carries a code

Local misuse and a misbehaving peer are different branches, so that code which recovers from peers
never swallows a caller's mistake. Every message ends with what the reader can do next.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

if "SwarmModelForCausalLM" not in getattr(sys.modules["swarmkit"], "__all__", ()):
    # Both packages were installed into one folder: the other one's `__init__.py` lies among our files.
    raise ImportError(
        "the package `swarmkit` that was imported is another project's, which PyPI has under that name; "
        "run `pip uninstall -y swarmkit`, and install the wheel of this one (swarmkit-llm) again"
    )


class SwarmkitError(Exception):
    """The root of everything that swarmkit raises on purpose."""


class UsageError(SwarmkitError, ValueError):
    """The caller asked for something that cannot be done as asked."""


class ModelError(UsageError):
    """A checkpoint is missing, incomplete, or of a kind that is not supported."""


class MemoryLimitError(UsageError):
    """Not even one block of a model fits into the memory that is allowed.

    Attributes:
        missing_bytes: how much more it takes.
    """

    def __init__(self, message: str, missing_bytes: int = 0) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class AdapterError(UsageError):
    """An adapter does not fit the model, or is of a kind that is not supported."""


class SessionError(UsageError):
    """A session was used after its end, or beyond its declared length."""


class TransportError(SwarmkitError):
    """This machine's own networking could not start, or has ended."""


StartCause = Literal[
    "port",
    "address",
    "forbidden",
    "firewall",
    "proxy",
    "network",
    "peers",
    "files",
    "limits",
    "program",
    "busy",
    "unknown",
]
"""What keeps the p2p daemon from starting: the port is in use; this machine does not have the address; the
system or its firewall forbids it; nothing comes back from the initial peers; a proxy is between; there is no
way to them; they answer, but not as themselves, or refuse; open files, or memory, threads or disk are used
up; its program is missing or of another system; the machine is too busy.
"""


class DaemonStartError(TransportError):
    """The p2p daemon could not start.

    Attributes:
        cause: one word for why.
    """

    def __init__(self, message: str, cause: StartCause = "unknown") -> None:
        super().__init__(message)
        self.cause: StartCause = cause


class NoContactError(TransportError):
    """No other peer of the swarm answers at present, so that nothing is known about the servers.

    Attributes:
        since: Unix time in seconds at which a peer answered last; None = none has ever answered.
    """

    def __init__(self, message: str, since: float | None = None) -> None:
        super().__init__(message)
        self.since = since


class NoRouteError(SwarmkitError):
    """No server is known for some of the blocks that are needed.

    Attributes:
        missing: half-open ranges of block indices that no server has.
    """

    def __init__(self, message: str, missing: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class DeadlineError(SwarmkitError, TimeoutError):
    """A step took longer than `DeadlineSettings.step_deadline_s`; its session can go on with another one."""


class PeerError(SwarmkitError):
    """Another peer is at fault.

    Attributes:
        peer_id: the peer, or an empty string where it is not known yet.
    """

    def __init__(self, message: str, peer_id: str = "") -> None:
        super().__init__(message)
        self.peer_id = peer_id

    @property
    def is_exclusion(self) -> bool:
        """Whether the peer deals with other peers and not with this one, whatever it asks."""
        return False

    @property
    def is_loss(self) -> bool:
        """Whether the peer may be gone."""
        return False


class PeerUnreachableError(PeerError):
    """The peer cannot be dialled, or the connection to it ended."""

    @property
    def is_loss(self) -> bool:
        return True


class NotServedError(PeerUnreachableError):
    """The peer was reached, and does not serve streams of the name that was asked for."""


class NotAdmittedError(PeerUnreachableError):
    """The peer was reached and refuses this one, or is refused by it: by a list of peers, or for want of the
    swarm's key.
    """

    @property
    def is_exclusion(self) -> bool:
        return True

    @property
    def is_loss(self) -> bool:
        return False


class PeerTimeoutError(PeerError):
    """The peer did not answer within its deadline."""


class ProtocolError(PeerError):
    """The peer sent bytes that are not what they should be."""


class IllegalMessageError(ProtocolError):
    """The peer sent a well-formed message that is not allowed at this point of the conversation."""


class MessageTooLargeError(ProtocolError):
    """The peer announced a message with more bytes than this side takes."""


class RemoteError(PeerError):
    """The peer answered with a fault.

    Attributes:
        code: one of `swarmkit.net.protocol.messages.FaultCode`.
        retry_after_s: of a busy peer, in how many seconds it says it has room; else 0.
    """

    def __init__(self, message: str, peer_id: str = "", code: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, peer_id)
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def is_busy(self) -> bool:
        """Whether the peer is well, and only has no room now."""
        return self.code == "busy"

    @property
    def is_exclusion(self) -> bool:
        return self.code == "not_admitted"


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise an error that a task group has wrapped as itself, if it is the only one."""
    try:
        yield
    except BaseException as error:
        inner: BaseException = error
        while len(errors := list(getattr(inner, "exceptions", ()))) == 1:
            inner = errors[0]
        if inner is error:
            raise
        raise inner from inner.__cause__
