"""The `swarmkit` command. Each command lives in a file of its own and imports what is heavy when it runs."""

from __future__ import annotations

import sys

from swarmkit.cli.app import app
from swarmkit.cli.console import fail
from swarmkit.errors import SwarmkitError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; our own errors are one line for people, not a traceback."""
    try:
        app()
    except SwarmkitError as error:
        fail(error)
        sys.exit(1)
