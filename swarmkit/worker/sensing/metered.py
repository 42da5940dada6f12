"""Whether the connection to the Internet costs by the byte."""

from __future__ import annotations

import sys

from swarmkit.worker.sensing.probes import UnknownError

_METERED = {1: True, 2: False, 3: True, 4: False}
"""NetworkManager's `Metered`: yes, no, and its guesses; 0 = unknown."""


def metered() -> bool | None:
    """Ask NetworkManager; elsewhere it is not known.

    Raises:
        UnknownError: nobody can tell.
    """
    if sys.platform != "linux":
        raise UnknownError("cannot be told on this system")
    from swarmkit.worker.sensing.dbus import SYSTEM, desktop_bus

    manager = "org.freedesktop.NetworkManager"
    value = desktop_bus().property(SYSTEM, manager, "/org/freedesktop/NetworkManager", manager, "Metered")
    return _METERED.get(value)
