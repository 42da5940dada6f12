"""The place of a session's processes among those of other sessions on Linux.

With its groups by session ("autogroup"), Linux shares processors among sessions before it looks at the
priorities of their processes, so that a process in a session of its own takes as much as all of another
session, however nice it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

_TRIES = 5
_WISH_S = 0.1


def set_session_nice(nice: int) -> None:
    """Let this process's session come after others by so much, if this process leads it."""
    if sys.platform != "linux" or os.getsid(0) != os.getpid():
        return
    # The kernel takes one such wish in a tenth of a second, of all that have no special rights together.
    for _ in range(_TRIES):
        with contextlib.suppress(BlockingIOError):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # it shares in no such way
                write_session_nice(os.getpid(), nice)
            return
        time.sleep(_WISH_S)


def write_session_nice(pid: int, nice: int) -> None:
    """Ask the kernel once, for the session of a process.

    Raises:
        OSError: it does not share by sessions, forbids it, has ended the process, or takes no wish just now.
    """
    Path(f"/proc/{pid}/autogroup").write_text(str(nice))
