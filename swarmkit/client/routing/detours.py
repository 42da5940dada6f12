"""How much longer than usual is the way from one server to another? Pure.

The cost of a server counts the way between it and the client. Outputs go from server to server, and two
servers that are both near the client may be far from each other. What this client has seen of a way counts,
and otherwise what the server at its beginning says. Such a claim can only make a way longer, so that it draws
no work.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from swarmkit.events import StepFinished
from swarmkit.net.registry.records import Announcement

_LASTS_S = 900.0
"""What a server says of a way is believed until it is so old."""

Pair = tuple[str, str]
"""Two peer ids."""


def detours(
    steps: Iterable[StepFinished], servers: Sequence[Announcement], way_s: Callable[[str], float]
) -> dict[Pair, float]:
    """By two peers, how many seconds longer than usual it takes from one to the other, as far as known.

    Args:
        steps: of this client.
        way_s: from this client to a server and back, by service id.
    """
    return {**_announced(servers, way_s), **_seen(steps)}


def _announced(servers: Sequence[Announcement], way_s: Callable[[str], float]) -> dict[Pair, float]:
    by_name = {server.service_id: server for server in servers}
    found: dict[Pair, float] = {}
    for server in servers:
        for link in server.links:
            other = by_name.get(link.service_id)
            if other is None or link.age_s > _LASTS_S:
                continue
            longer_s = (link.round_trip_s - way_s(other.service_id)) / 2  # one way
            found[server.peer_id, other.peer_id] = max(0.0, longer_s)
    return found


def _seen(steps: Iterable[StepFinished]) -> dict[Pair, float]:
    """Compares the ways by which outputs were pushed to one server from several."""
    ways: dict[str, dict[str, list[float]]] = {}
    for step in steps:
        if step.tokens != 1 or step.rows != 1 or step.recovered:
            continue
        for before, hop in pairwise(step.hops):
            if not hop.sent_bytes:
                ways.setdefault(hop.peer_id, {}).setdefault(before.peer_id, []).append(hop.network_ms)
    found: dict[Pair, float] = {}
    for peer, by_sender in ways.items():
        usual_ms = {sender: statistics.median(seen) for sender, seen in by_sender.items()}
        shortest_ms = min(usual_ms.values())
        found.update({(sender, peer): (ms - shortest_ms) / 1e3 for sender, ms in usual_ms.items()})
    return found
