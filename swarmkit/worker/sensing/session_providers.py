"""What one kind of desktop has to tell, and what every system tells in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil

from swarmkit.worker.sensing.probes import UnknownError


@dataclass(frozen=True)
class SessionProviders:
    """How one kind of desktop is asked. Each returns its signal, or raises `UnknownError`."""

    idle_s: Callable[[], float]
    locked: Callable[[], bool]
    full_screen: Callable[[], str]
    film: Callable[[], str]
    remote_session: Callable[[], bool]


def logged_in_remotely() -> bool:
    """Whether somebody is logged in from another machine, as far as the system's own list tells.

    Raises:
        UnknownError: the system has no such list.
    """
    try:
        users = psutil.users()
    except OSError as error:
        raise UnknownError(f"the system's list of users cannot be read: {error}") from error
    return any(user.host and not user.host.startswith((":", "localhost", "tmux", "screen")) for user in users)
