"""What has happened in a worker, for programs that follow it."""

from __future__ import annotations

from swarmkit.events import Event


class WorkerStateChanged(Event, frozen=True):
    """The worker is in another state, or in the same for another reason."""

    state: str
    reason: str
    words: str
    until: float | None = None

    def __str__(self) -> str:
        return self.words


class WorkerSettingsChanged(Event, frozen=True):
    """The person has chosen other settings."""

    def __str__(self) -> str:
        return "the settings were changed"


class WorkerTrouble(Event, frozen=True):
    """Something that the person should know."""

    words: str

    def __str__(self) -> str:
        return self.words
