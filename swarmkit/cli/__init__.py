"""The `swarmkit` command."""

from __future__ import annotations

import atexit
import errno
import gc
import sys

from swarmkit.cli.interrupt import EXIT_CODE, end_on_interrupt
from swarmkit.errors import SwarmkitError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def _leave_quickly() -> None:
    """Let the interpreter's end walk no garbage, unless a module would report all that as leaked."""
    if "triton" not in sys.modules:  # its nanobind prints a line for each object that is never collected
        gc.freeze()


def main() -> None:
    """Run the command line; our own errors are one line for people, not a traceback."""
    end_on_interrupt()
    # transformers makes a million objects that stay: walking them costs half a second of every start and a
    # second of every end.
    gc.set_threshold(100_000, 50, 100)
    atexit.register(_leave_quickly)
    from swarmkit.cli.commands import app
    from swarmkit.cli.console import fail

    try:
        app()
    except SwarmkitError as error:
        fail(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(EXIT_CODE)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f"{error.filename} cannot be used" if error.filename else "this machine's disk cannot be used"
        fail(OSError(f"{where}: {error.strerror}; make room, or name another place"))
        sys.exit(1)
