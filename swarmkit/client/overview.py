"""The state of a swarm as one value for monitors: the page of an API, a tab of a playground, a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from swarmkit.client.status import ModelStatus, ServerStatus


def swarm_overview(models: Sequence[ModelStatus]) -> dict[str, Any]:
    """What monitors show of a swarm, as plain values.

    Each model has `runs` (whether every block has a server), `missing`, `replicas` (servers of each block),
    `free_cache_tokens` (tokens of one row for which every block still has room; 0 where one has none) and
    `servers`. Each server has what `ServerStatus` tells, and `if_it_left`: the blocks that would be `missing`
    then, and whether the model `stops` because of it.
    """
    return {"models": [_model(model) for model in models]}


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
