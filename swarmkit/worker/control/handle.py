"""The file that tells programs of the same person where a worker listens, and the token they need."""

from __future__ import annotations

from pathlib import Path

import msgspec

from swarmkit.errors import SwarmkitError
from swarmkit.worker.places import check_private, write_atomically


class NoWorkerError(SwarmkitError):
    """No worker runs, or it does not answer."""


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a worker.

    Attributes:
        socket: the path of its Unix socket; empty where it listens on loopback.
        port: on 127.0.0.1; 0 where it listens on a Unix socket.
    """

    token: str
    pid: int
    socket: str = ""
    port: int = 0

    def write(self, path: Path) -> None:
        """Write it so that this person alone can read it."""
        write_atomically(path, msgspec.json.encode(self))

    @classmethod
    def read(cls, path: Path) -> Handle:
        """Read the handle of the worker that runs.

        Raises:
            NoWorkerError: there is none.
            UsageError: the file is not private, so that its content cannot be believed.
        """
        try:
            check_private(path)
            return _DECODER.decode(path.read_bytes())
        except FileNotFoundError:
            raise NoWorkerError(
                "no worker runs on this computer for you; start it with `swarmkit worker run`"
            ) from None
        except (OSError, msgspec.DecodeError) as error:
            raise NoWorkerError(f"{path} cannot be read ({error}); start the worker again") from error


_DECODER = msgspec.json.Decoder(Handle)
"""Made here, by one thread: two that were the first to decode a kind, at the same moment, crashed msgspec."""
