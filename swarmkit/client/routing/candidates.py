"""The servers among which a route is searched, where more are announced than can be looked at. Pure."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Container, Sequence

from swarmkit.net.registry.lot import draw
from swarmkit.net.registry.records import Announcement
from swarmkit.net.registry.swarm_map import SwarmMap

MOST_IN_VIEW = 4096
"""So many servers of a model are kept in mind: a search for a route goes through all of them."""

MOST_FOR_A_BLOCK = 32
"""So many servers of each block are looked at: one half are those that cost least, the others are drawn."""


def best_of_each_block(
    start: int,
    stop: int,
    servers: Sequence[Announcement],
    cost_s: Callable[[Announcement, int, int], float],
    salt: str,
    most: int = MOST_FOR_A_BLOCK,
) -> Sequence[Announcement]:
    """Some servers of each block in [start, stop), at most `most` for each block that fewer do not hold.

    Every block that one of the servers holds has at least one in the result. The time grows with the number
    of servers, not with its square, so that a flood of announcements costs little.

    Args:
        cost_s: of a part of a server, as for `routing.find_route`.
        salt: this client's own, for the draw.
    """
    if len(servers) <= most:
        return servers

    def cost_of_a_block(server: Announcement) -> float:
        low, high = max(start, server.start), min(stop, server.stop)
        return cost_s(server, low, high) / (high - low)

    inside = [each for each in servers if each.start < stop and each.stop > start]
    by_cost = sorted(inside, key=cost_of_a_block)
    by_chance = sorted(inside, key=lambda each: _digest(salt + each.service_id))
    kept: dict[str, Announcement] = {}
    for order in (by_cost, by_chance):
        room = dict.fromkeys(range(start, stop), most // 2)
        for server in order:
            blocks = [b for b in range(max(start, server.start), min(stop, server.stop)) if b in room]
            if not blocks:
                continue
            kept[server.service_id] = server
            for block in blocks:
                room[block] -= 1
                if not room[block]:
                    del room[block]
            if not room:
                break
    return list(kept.values())


def within_bounds(
    view: SwarmMap, used: Container[str], chance: random.Random, most: int = MOST_IN_VIEW
) -> SwarmMap:
    """A view with at most `most` servers besides those in `used`: the others are drawn anew each time, from
    those of each block.

    Announcements that are good for an hour would otherwise heap up, as long as a flood of them goes on.

    Args: used: ids of the services that this client has used or tried.
    """
    others = [each for service, each in view.announcements.items() if service not in used]
    if len(others) <= most:
        return view
    kept = [each for service, each in view.announcements.items() if service in used]
    return SwarmMap().apply(*kept, *draw(others, lambda each: range(each.start, each.stop), most, chance))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
