"""The application with all its commands. Each has a file of its own, importing what is heavy when it runs."""

from __future__ import annotations

from swarmkit.cli.app import app

# Importing a command's file adds it to `app`. The order is the order in `--help`.
# isort: off
from swarmkit.cli import demo, serve, generate, chat, playground, api  # noqa: F401
from swarmkit.cli import worker, tray, status, route, bootstrap, invite, swarm_key, identity  # noqa: F401
from swarmkit.cli import plan, simulate, check, doctor, fingerprint, bench, uninstall  # noqa: F401
# isort: on

__all__ = ["app"]
