"""What only a program in the person's own session can sense: whether somebody uses the computer, and how."""

from __future__ import annotations

import os
import sys
from typing import Protocol

from swarmkit.clock import SYSTEM_CLOCK, Clock
from swarmkit.worker.sensing.probes import Probe, ask_all, notes_of
from swarmkit.worker.sensing.session_providers import SessionProviders, logged_in_remotely
from swarmkit.worker.signals import SessionSignals


class SessionSensing(Protocol):
    """Tells what the person does; the tests have one that tells what they want."""

    def sense(self) -> SessionSignals:
        """Return what is known now. Takes two seconds at most."""


class OwnSession:
    """Senses the session that this process runs in."""

    def __init__(self, providers: SessionProviders | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        asked = vars(providers or providers_here())
        words = {"idle_s": "input", "remote_session": "remote session", "full_screen": "full screen"}
        self._probes: dict[str, Probe[object]] = {
            name: Probe(words.get(name, name), read, clock) for name, read in asked.items()
        }

    def sense(self) -> SessionSignals:
        """See `SessionSensing.sense`."""
        ask_all(self._probes.values())
        values = {name: probe.value() for name, probe in self._probes.items()}
        return SessionSignals(**values, notes=notes_of(*self._probes.values()))  # type: ignore[arg-type]


def providers_here() -> SessionProviders:
    """Return the providers for this system and desktop."""
    if sys.platform == "win32":
        from swarmkit.worker.sensing import windows

        return SessionProviders(
            windows.idle_s, windows.locked, windows.full_screen, windows.film, windows.remote_session
        )
    if sys.platform == "darwin":
        from swarmkit.worker.sensing import macos

        return SessionProviders(macos.idle_s, macos.locked, macos.full_screen, macos.film, logged_in_remotely)
    from swarmkit.worker.sensing import linux

    return linux.providers(os.environ)
