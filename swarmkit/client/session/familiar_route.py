"""A session that begins like an earlier one goes where that one went, if this saves time."""

from __future__ import annotations

from collections.abc import Sequence

import anyio.to_thread
import torch

from swarmkit.client.routing.affinity import time_saved_s
from swarmkit.client.routing.route import Hop
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.client.swarm.prefix_cache import Chain

_MOST_CHAINS = 4


async def familiar_route(
    swarm: SwarmClient, hops: list[Hop], hidden: torch.Tensor, hosted_adapter: str
) -> list[Hop]:
    """The route of an earlier session with the same first tokens, or the one that was planned.

    Args:
        hops: as planned.
        hidden: `[tokens, hidden]`, what the session's first step brings.
    """
    planned = _chain_of(hops)
    chains = swarm.prefix_cache.chains(hops[0].start, hops[-1].stop, _MOST_CHAINS)
    if not set(chains) - {planned}:
        return hops
    prompt_token_s, planned_s = swarm.routes.prompt_token_s(hops), swarm.routes.seconds(hops)
    best, most_s = hops, 0.0
    for chain in chains:
        earlier = hops if chain == planned else _usable(swarm, chain, hosted_adapter)
        if not earlier:
            continue
        found = await anyio.to_thread.run_sync(swarm.prefix_cache.find, chain, hidden[:-1])
        shared = 0 if found is None else found[1]
        extra_s = swarm.routes.seconds(earlier) - planned_s
        saved_s = time_saved_s(shared, prompt_token_s, extra_s)
        if saved_s > most_s:
            best, most_s = earlier, saved_s
    return best


def _chain_of(hops: Sequence[Hop]) -> Chain:
    return tuple((hop.server.service_id, hop.start, hop.stop) for hop in hops)


def _usable(swarm: SwarmClient, chain: Chain, hosted_adapter: str) -> list[Hop]:
    """The chain as a route; empty if not all of its servers can be used now."""
    servers = {server.service_id: server for server in swarm.known.servers(hosted_adapter)}
    hops = [Hop(servers[name], low, high) for name, low, high in chain if name in servers]
    is_whole = len(hops) == len(chain) and all(
        hop.server.start <= hop.start and hop.stop <= hop.server.stop and swarm.routes.may_use(hop)
        for hop in hops
    )
    return hops if is_whole else []
