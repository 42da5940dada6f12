"""The state of a swarm as one value for monitors: the page of an API, a tab of a playground, a command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from swarmkit.client.status import ModelStatus, ServerStatus
from swarmkit.drawing.values import ServerPicture

_HEAD = (
    "server",
    "blocks",
    "state",
    "tokens/s",
    "free cache",
    "round trip",
    "up for",
    "sessions",
    "queue",
    "wait",
    "computes in",
    "version",
    "if it left",
)


def swarm_overview(models: Sequence[ModelStatus]) -> dict[str, Any]:
    """What monitors show of a swarm, as plain values.

    Each model has `runs` (whether every block has a server), `missing`, `replicas` (servers of each block),
    `free_cache_tokens` (tokens of one row for which every block still has room; 0 where one has none) and
    `servers`. Each server has what `ServerStatus` tells, and `if_it_left`: the blocks that would be `missing`
    then, and whether the model `stops` because of it.
    """
    return {"models": [_model(model) for model in models]}


def status_pictures(model: ModelStatus) -> list[ServerPicture]:
    """The servers of a model, to be drawn."""
    return [
        ServerPicture(
            server.peer_id,
            shown_name(server),
            *server.blocks,
            state=server.state,
            throughput=server.throughput,
            free_cache_tokens=server.free_cache_tokens,
            dtype=server.dtype,
        )
        for server in model.servers
    ]


def status_rows(model: ModelStatus) -> list[Sequence[str]]:
    """A table of a model's servers for people, its head first; "–" is what a server did not answer."""
    return [_HEAD, *(_row(model, server) for server in model.servers)]


def shown_name(server: ServerStatus) -> str:
    """What people call a server: the name that its owner gave, or the end of its peer id."""
    return server.name or f"…{server.peer_id[-6:]}"


def _row(model: ModelStatus, server: ServerStatus) -> Sequence[str]:
    def told(value: float | None, form: Callable[[float], str]) -> str:
        return "–" if value is None else form(value)

    return (
        shown_name(server),
        f"{server.blocks[0]}:{server.blocks[1]}",
        _state(model, server),
        f"{server.throughput:,.0f}",
        f"{server.free_cache_tokens:,}",
        told(server.round_trip_s, lambda seconds: f"{seconds * 1e3:.1f} ms"),
        told(server.uptime_s, duration),
        told(server.sessions, str),
        told(server.queue, str),
        told(server.expected_wait_s, lambda seconds: f"{seconds:.1f} s"),
        server.dtype,
        server.software,
        _if_it_left(model, server),
    )


def _state(model: ModelStatus, server: ServerStatus) -> str:
    """A server's state, and of one that moves from where or where to."""
    others = [one for one in model.servers if one.peer_id == server.peer_id and one is not server]
    for other in others:
        low, high = other.blocks
        if server.state == "joining" and other.state != "joining":
            return f"joining from {low}:{high}"
        if server.state == "leaving" and other.state == "online":
            return f"leaving for {low}:{high}"
    return server.state


def _if_it_left(model: ModelStatus, server: ServerStatus) -> str:
    if server.state != "online":
        return "nothing would break"
    first, end = server.blocks
    shared = [(max(low, first), min(high, end)) for low, high in model.missing_without(server)]
    named = ", ".join(f"{low}:{high}" for low, high in shared if low < high)
    if not named:
        return "nothing would break"
    return (
        f"{named} would be missing, too" if model.missing else f"the model would stop: no other has {named}"
    )


def duration(seconds: float) -> str:
    """Seconds in the largest unit that is passed, such as "3 min"."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _model(model: ModelStatus) -> dict[str, Any]:
    return {
        "model": model.model,
        "fingerprint": model.fingerprint,
        "num_blocks": model.num_blocks,
        "runs": not model.missing,
        "missing": [list(blocks) for blocks in model.missing],
        "replicas": list(model.replicas),
        "free_cache_tokens": _free_cache(model),
        "servers": [_server(model, server) for server in model.servers],
    }


def _server(model: ModelStatus, server: ServerStatus) -> dict[str, Any]:
    missing = model.missing_without(server)
    left = {"missing": [list(blocks) for blocks in missing], "stops": bool(missing) and not model.missing}
    lists = {"blocks": list(server.blocks), "addresses": list(server.addresses)}
    return {**asdict(server), **lists, "if_it_left": left}


def _free_cache(model: ModelStatus) -> int:
    """Of each block the room that its servers have together, and of all blocks the least."""
    online = [server for server in model.servers if server.state == "online"]
    rooms = [
        sum(server.free_cache_tokens for server in online if server.blocks[0] <= block < server.blocks[1])
        for block in range(model.num_blocks)
    ]
    return min(rooms, default=0)
