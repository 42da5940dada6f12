"""The route that a client would take, with reasons, a forecast, and what would make it faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import torch

from swarmkit.client.local_speed import local_token_s
from swarmkit.client.routing.forecast import Forecast, HopFacts, OneMore, forecast, one_more
from swarmkit.client.routing.route import Hop
from swarmkit.client.swarm.client import SwarmClient
from swarmkit.client.swarm.hop_trial import try_hop
from swarmkit.errors import NoRouteError, PeerError
from swarmkit.net.registry.records import Announcement

if TYPE_CHECKING:
    from swarmkit.client.model import SwarmModelForCausalLM

_OWN_STEPS = 5


@dataclass(frozen=True)
class HopReason:
    """Why one server of a route was chosen.

    Attributes:
        facts: what is known of it.
        others: how many other servers have all of its blocks.
        runner_up: what would be used in its place, server by server; empty if nobody has the blocks.
        runner_up_costs_s: by how much that would make each token longer, as routes are compared.
        announced_rate: tokens per second that it says it computes.
        announced_age_s: since when it has not measured that.
        free_cache_tokens: as it says.
    """

    facts: HopFacts
    others: int
    runner_up: tuple[str, ...]
    runner_up_costs_s: float
    announced_rate: float
    announced_age_s: float
    free_cache_tokens: int


@dataclass(frozen=True)
class RouteReport:
    """A route, hop by hop, and what to expect of it.

    Attributes:
        model: its name.
        num_blocks: of the whole model.
        push: whether servers hand outputs on to each other.
        prompt_tokens: for which `forecast.first_token_s` is.
        swarm_rate: tokens per second that the servers of the weakest block claim together.
        one_more: what another server would bring to this client; None if nothing.
        local_token_s: of a token on this machine alone; None if the model does not fit, or is not here.
        own_s: of a token in the client's own part: embeddings and output layer.
        heads: the servers that offer to compute the output layer, each with the seconds that it says it
            takes for a token, with the way there and back; the quickest first.
    """

    model: str
    num_blocks: int
    hops: tuple[HopReason, ...]
    forecast: Forecast
    push: bool
    prompt_tokens: int
    swarm_rate: float
    one_more: OneMore | None
    local_token_s: float | None
    own_s: float = 0.0
    heads: tuple[tuple[str, float], ...] = ()

    @property
    def is_faster_alone(self) -> bool:
        """Whether this machine would be faster without the swarm."""
        return self.local_token_s is not None and self.local_token_s < self.forecast.token_s

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain values."""
        plain = asdict(self)
        plain["forecast"] |= {
            "tokens_per_s": self.forecast.tokens_per_s,
            "bottleneck": asdict(self.forecast.bottleneck),
        }
        return {**plain, "is_faster_alone": self.is_faster_alone}


def explain_route(
    model: SwarmModelForCausalLM, prompt_tokens: int = 128, *, alone: bool = True
) -> RouteReport:
    """Plan a route as a session would, measure its servers with a few tokens of noise, and forecast.

    Args:
        model: a client of the swarm.
        alone: also measure whether this machine would be faster by itself.

    Raises:
        NoRouteError: no server has some blocks.
    """
    connection, swarm = model.connection, model.connection.client
    own_s = _own_s(model, swarm.clock.now)
    here_s = local_token_s(model._checkpoint, now=swarm.clock.now) if alone else None
    return connection.call(
        report_route, swarm, prompt_tokens, own_s, None if here_s is None else here_s + own_s
    )


async def report_route(
    swarm: SwarmClient, prompt_tokens: int, own_s: float = 0.0, local_s: float | None = None
) -> RouteReport:
    """As `explain_route`, on the event loop.

    Args:
        own_s: what the client computes for each token.
        local_s: of a token on this machine alone.
    """
    total, push = swarm.model.num_blocks, swarm.settings.transfer.push
    await swarm.known.refresh()
    route = swarm.routes.plan(0, total)
    facts = await _facts(swarm, route)
    links = _known_links(swarm, [hop.server for hop in route])
    found = forecast(facts, links, push=push, prompt_tokens=prompt_tokens, own_s=own_s)
    servers = swarm.known.servers()
    most = max((server.stop - server.start for server in servers), default=0)
    return RouteReport(
        model=swarm.model.name,
        num_blocks=total,
        hops=tuple(_reason(swarm, hop, of_hop) for hop, of_hop in zip(route, facts, strict=True)),
        forecast=found,
        push=push,
        prompt_tokens=prompt_tokens,
        swarm_rate=min(_rates(servers, total), default=0.0),
        one_more=one_more(facts, links, most, found),
        local_token_s=local_s,
        own_s=own_s,
        heads=_heads(swarm, servers),
    )


def _heads(swarm: SwarmClient, servers: Sequence[Announcement]) -> tuple[tuple[str, float], ...]:
    found = [
        (server.label, server.head_ms / 1e3 + swarm.routes.way_s(server.service_id))
        for server in servers
        if server.head_ms
    ]
    return tuple(sorted(found, key=lambda one: one[1]))


async def _facts(swarm: SwarmClient, route: Sequence[Hop]) -> list[HopFacts]:
    """What each server of a route shows; what it says, where it does not answer."""
    found: dict[int, HopFacts] = {}

    async def one(index: int, hop: Hop) -> None:
        try:
            found[index] = await try_hop(swarm, hop)
        except PeerError:
            found[index] = _claimed(swarm, hop)

    async with anyio.create_task_group() as tasks:
        for index, hop in enumerate(route):
            tasks.start_soon(one, index, hop)
    return [found[index] for index in range(len(route))]


def _claimed(swarm: SwarmClient, hop: Hop) -> HopFacts:
    server, way_s = hop.server, swarm.routes.way_s(hop.server.service_id)
    share = (hop.stop - hop.start) / (server.stop - server.start)
    compute_s = share / max(server.throughput, 1e-3)
    prompt_s = share / server.forward_rate if server.forward_rate else compute_s
    return HopFacts(
        server.peer_id, server.label, hop.start, hop.stop, way_s, compute_s, server.expected_wait_s, prompt_s,
        2 * way_s,
    )  # fmt: skip


def _known_links(swarm: SwarmClient, servers: Sequence[Announcement]) -> dict[tuple[str, str], float]:
    peers = {server.service_id: server.peer_id for server in servers}
    return {
        (server.peer_id, peers[link.service_id]): link.round_trip_s
        for server in servers
        for link in server.links
        if link.service_id in peers
    }


def _reason(swarm: SwarmClient, hop: Hop, facts: HopFacts) -> HopReason:
    server = hop.server
    same = [one for one in swarm.known.servers() if one.start <= hop.start and hop.stop <= one.stop]
    try:
        others = swarm.routes.plan(hop.start, hop.stop, frozenset([server.service_id]))
    except NoRouteError:
        others = []
    costs_s = swarm.routes.seconds(others) - swarm.routes.seconds([hop]) if others else math.inf
    return HopReason(
        facts=facts,
        others=sum(one.service_id != server.service_id for one in same),
        runner_up=tuple(map(str, others)),
        runner_up_costs_s=costs_s,
        announced_rate=server.throughput,
        announced_age_s=server.measured_age_s,
        free_cache_tokens=server.free_cache_tokens,
    )


def _rates(servers: Sequence[Announcement], total: int) -> list[float]:
    """For each block, the tokens per second that its servers claim together."""
    return [
        sum(server.throughput for server in servers if server.start <= block < server.stop)
        for block in range(total)
    ]


def _own_s(model: SwarmModelForCausalLM, now: Any) -> float:
    """Seconds that the client's own part of a token takes: embeddings and output layer."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return 0.0
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    seconds = []
    with torch.inference_mode():
        for _ in range(_OWN_STEPS):
            began_at = now()
            head(embeddings(token)).argmax(-1).to("cpu")
            seconds.append(now() - began_at)
    return min(seconds)
