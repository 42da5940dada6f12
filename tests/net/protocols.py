"""All protocols of streams between peers, so that tests of every endpoint do not forget a new one."""

from __future__ import annotations

import importlib
import pkgutil

from swarmkit.net import protocol
from swarmkit.net.protocol.protocol import Protocol


def _all() -> dict[str, Protocol]:
    found = {}
    for module in pkgutil.iter_modules(protocol.__path__, f"{protocol.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Protocol):
                found[value.name] = value
    return found


PROTOCOLS = list(_all().values())
