"""The `swarmkit` command. Each command lives in a file of its own and imports what is heavy when it runs."""

from __future__ import annotations

import atexit
import gc
import sys

from swarmkit.cli.app import app
from swarmkit.cli.console import fail
from swarmkit.errors import SwarmkitError

# Importing a command's file adds it to `app`. The order is the order in `--help`.
# isort: off
from swarmkit.cli import demo, serve, generate, chat, api, status, bootstrap, plan, check, bench  # noqa: F401
# isort: on

__all__ = ["app", "main"]


def _leave_quickly() -> None:
    """Let the interpreter's end walk no garbage, unless a module would report all that as leaked."""
    if "triton" not in sys.modules:  # its nanobind prints a line for each object that is never collected
        gc.freeze()


def main() -> None:
    """Run the command line; our own errors are one line for people, not a traceback."""
    # transformers makes a million objects that stay: walking them costs half a second of every start and a
    # second of every end.
    gc.set_threshold(100_000, 50, 100)
    atexit.register(_leave_quickly)
    try:
        app()
    except SwarmkitError as error:
        fail(error)
        sys.exit(1)
