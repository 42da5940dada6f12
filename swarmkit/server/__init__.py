"""Serving blocks: which ones, on what device, for whom.

`Server` is the door. `placement` and `scheduler` decide (pure); `engine` is the one thread that touches the
device, and runs many sessions' steps together; `kv_budget` accounts for every byte of keys and values;
`service` speaks the protocol with one client per stream; `node` ties them to a life: choose blocks, load,
announce, serve, drain.
Never imports `swarmkit.client`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarmkit.server.server import Server

__all__ = ["Server"]


def __getattr__(name: str) -> Any:
    if name == "Server":
        from swarmkit.server.server import Server

        return Server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
