"""The person's settings while no worker runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swarmkit.errors import UsageError
from swarmkit.worker.places import WorkerPlaces
from swarmkit.worker.settings import WorkerSettings, changed, load_settings, save_settings


def settings_offline(places: WorkerPlaces | None = None) -> WorkerSettings:
    """Read the settings.

    Raises:
        UsageError: the file cannot be used; it was kept aside.
    """
    loaded = load_settings((places or WorkerPlaces.of_this_person()).settings)
    if loaded.trouble:
        raise UsageError(loaded.trouble)
    return loaded.settings


def change_offline(changes: Mapping[str, Any], places: WorkerPlaces | None = None) -> WorkerSettings:
    """Replace some settings, which the next worker finds.

    Raises:
        UsageError: a name or a value is not allowed, or the file cannot be used.
        OSError: it cannot be written.
    """
    places = places or WorkerPlaces.of_this_person()
    settings = changed(settings_offline(places), changes)
    save_settings(places.settings, settings)
    return settings
