"""How a session begins where an earlier one with the same first tokens was, if servers kept its pages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import anyio.to_thread
import torch

from swarmkit.client.session.replica import StageReplica
from swarmkit.client.session.session_route import SessionRoute, at_once
from swarmkit.client.swarm.prefix_cache import CachedPrefix, ClientPrefixCache, best_start


async def restore_prefix(
    cache: ClientPrefixCache, hidden: torch.Tensor, route: SessionRoute
) -> tuple[CachedPrefix, int, Mapping[StageReplica, int]] | None:
    """Have each server begin with what it has kept of an earlier session that had the same first tokens.

    At least one token is left to be sent, because its output is needed.

    Args: hidden: `[tokens, hidden]`, what the first step of a session brings.

    Returns: the earlier session's hidden states, the token from which on the step is to be sent, and how many
        tokens each server holds; None if the whole step is to be sent.
    """
    if not cache:
        return None
    found = await anyio.to_thread.run_sync(cache.find, route.chain, hidden[:-1])
    if found is None:
        return None
    entry, known = found
    held = dict.fromkeys(route.stages, 0)

    async def ask(stage: StageReplica) -> None:
        if stage.connection is None:
            await stage.open(route.max_length)
        held[stage] = await stage.restore_prefix(entry.states[stage.hop.start][:known])

    for stage in await at_once({stage: partial(ask, stage) for stage in route.stages}):
        stage.drop()  # the step finds the server lost when it needs it, and tells so
    start = best_start(list(held.values()), known, len(hidden))
    return (entry, start, held) if start else None
