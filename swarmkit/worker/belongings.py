"""What a worker has put on this computer, so that its removal can show and take away all of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from swarmkit.worker.control.values import Belonging, Belongings
from swarmkit.worker.places import WorkerPlaces


def belongings(places: WorkerPlaces | None = None) -> Belongings:
    """Return what a worker has put on this computer, and what each takes."""
    places = places or WorkerPlaces.of_this_person()
    parts = [
        Belonging(what=what, path=str(path), size_bytes=size_of(path))
        for what, path in (
            ("weights of models, also of other programs that use swarmkit", places.weights),
            ("settings", places.config),
            ("history, log and key", places.state),
            ("lock, socket and token", places.runtime),
        )
        if path.exists()
    ]
    return Belongings(parts=tuple(parts), size_bytes=sum(part.size_bytes for part in parts))


def size_of(path: Path) -> int:
    """Bytes of all files in a folder; those that vanish meanwhile do not count."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).lstat().st_size
    return total
