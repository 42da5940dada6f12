"""Which servers, in which order, run which blocks? Pure: announcements in, a route out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from swarmkit.client.routing.claims import Shown, believed_s
from swarmkit.errors import NoRouteError, NotAdmittedError, PeerError
from swarmkit.net.registry.records import Announcement
from swarmkit.placement.ranges import uncovered

Cost = Callable[[Announcement, int, int], float]
"""`cost(server, start, stop)`: seconds that a token spends at a server for blocks [start, stop), and getting
there."""


@dataclass(frozen=True)
class Hop:
    """One server's part of a route: blocks [start, stop) at `server`."""

    server: Announcement
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.server.label} [{self.start}:{self.stop}]"


Detours = Mapping[tuple[str, str], float]
"""By two peer ids, how many seconds longer the way between the peers is than `cost` says; 0 or more."""


@dataclass(frozen=True)
class _Arrival:
    """The cheapest way through all blocks before a boundary that ends at one server."""

    seconds: float
    hop: Hop
    before: _Arrival | None


def find_route(
    start: int, stop: int, servers: Sequence[Announcement], cost: Cost, detours: Detours | None = None
) -> list[Hop]:
    """The cheapest chain of servers that runs blocks [start, stop) in order.

    A server may be used for any part of what it holds. Blocks only go forward, so the shortest path over
    (server, block boundary) is found in one sweep, with the cheapest way from server to server::

        arrive(s, a) = min over servers r of best(r, a) + detour(r, s)
        best(s, b)   = min over a of arrive(s, a) + cost(s, a, b)

    Args: detours: as far as known. The time of a sweep grows with those that are on the way only.

    Raises:
        NoRouteError: no server has some of the blocks; the error names them.
    """
    cuts = {start, stop}
    for server in servers:
        cuts.update(edge for edge in (server.start, server.stop) if start < edge < stop)
    boundaries = sorted(cuts)
    best: dict[int, dict[str, _Arrival]] = {boundary: {} for boundary in boundaries}
    for index, low in enumerate(boundaries):
        ways = sorted(best[low].values(), key=lambda one: one.seconds)
        if low > start and not ways:
            continue
        for server in servers:
            if not server.start <= low < server.stop:
                continue
            came_s, before = _cheapest(ways, server, detours or {})
            for high in boundaries[index + 1 :]:
                if high > server.stop:
                    break
                total, name = came_s + cost(server, low, high), server.service_id
                if name not in best[high] or total < best[high][name].seconds:
                    best[high][name] = _Arrival(total, Hop(server, low, high), before)
    if start == stop:
        return []
    if not best[stop]:
        raise no_route(start, stop, servers)
    last: _Arrival | None = min(best[stop].values(), key=lambda one: one.seconds)
    route: list[Hop] = []
    while last is not None:
        route.append(last.hop)
        last = last.before
    return route[::-1]


def _cheapest(
    ways: Sequence[_Arrival], server: Announcement, detours: Detours
) -> tuple[float, _Arrival | None]:
    """The cheapest of some ways, in their order by seconds, to go on from to a server; (0, None) for none."""
    seconds, found = (math.inf, None) if ways else (0.0, None)
    for way in ways:
        if way.seconds >= seconds:
            break
        total = way.seconds + detours.get((way.hop.server.peer_id, server.peer_id), 0.0)
        if total < seconds:
            seconds, found = total, way
    return seconds, found


def lost_contact(start: int, stop: int, since: float | None) -> NoRouteError:
    """The error of a client that cannot look up servers.

    Args: since: Unix time in seconds at which another peer answered last; None = none has answered.
    """
    when = (
        "it was started" if since is None else f"{datetime.fromtimestamp(since, timezone.utc):%H:%M:%S} UTC"
    )
    return NoRouteError(
        f"this client has no contact with the swarm since {when}, so it cannot find servers of blocks "
        f"{start}:{stop}; check this machine's network. It joins the swarm again by itself as soon as it can",
        [(start, stop)],
    )


def no_route(
    start: int, stop: int, servers: Sequence[Announcement], name: str = "", others: Sequence[str] = ()
) -> NoRouteError:
    """The error that names the blocks of [start, stop) which none of `servers` holds.

    Args:
        name: of the model.
        others: the models that the swarm's servers have, where none has this one.
    """
    if others:
        same = f"; those of {name} there have other weights or another config" if name in others else ""
        return NoRouteError(
            f"no server of this swarm has the model {name}: its servers have {', '.join(others)}{same}. Join "
            "the swarm of your model, or start a server for it",
            [(start, stop)],
        )
    missing = uncovered(start, stop, [(server.start, server.stop) for server in servers])
    named = _named(missing) or f"{start}:{stop}"
    return NoRouteError(
        f"no server has blocks {named}; start a server for them (`swarmkit serve MODEL --blocks "
        f"{named.split(',')[0]} --join ADDRESS`), or wait for one with a larger route_timeout_s",
        missing,
    )


def shut_out(missing: Sequence[tuple[int, int]], peer_id: str, error: PeerError) -> NoRouteError:
    """The error of a client that every server of some blocks refuses altogether.

    Args:
        missing: these blocks.
        peer_id: the client's.
        error: what one of the servers said.
    """
    advice = (
        ". Ask the owners of the servers to admit this peer (`swarmkit serve --allow`), and keep its id with "
        "--identity FILE or identity_path="
    )
    return NoRouteError(
        f"every server of blocks {_named(missing)} refuses this client, peer {peer_id}; one of them says: "
        f"{error}" + ("" if isinstance(error, NotAdmittedError) else advice),
        missing,
    )


def left_out(missing: Sequence[tuple[int, int]]) -> NoRouteError:
    """The error of a client whose own lists exclude every server of some blocks."""
    return NoRouteError(
        f"the lists of this client exclude every server of blocks {_named(missing)}; allow one of them "
        "(--allow, allowed_servers), or do not block it (--block, blocked_servers)",
        missing,
    )


def _named(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{low}:{high}" for low, high in ranges)


def describe(name: str, num_blocks: int, servers: Sequence[Announcement]) -> str:
    """A model and the servers that hold its blocks, in one line."""
    missing = uncovered(0, num_blocks, [(server.start, server.stop) for server in servers])
    named = sorted(servers, key=lambda server: (server.start, server.stop, server.label))
    return (
        f"{name}: {num_blocks} remote blocks; servers: "
        + (", ".join(f"{server.label} [{server.start}:{server.stop}]" for server in named) or "none")
        + (f"; without a server: {', '.join(f'{low}:{high}' for low, high in missing)}" if missing else "")
    )


def route_cost(
    *,
    round_trip_s: Callable[[str], float],
    penalty_s: Callable[[str], float],
    wait_s: Callable[[str], float] = lambda peer_id: 0.0,
    tokens: int = 0,
    salt: str = "",
    shown: Callable[[str], Shown | None] = lambda peer_id: None,
    best_s: float = 0.0,
) -> Cost:
    """The cost that clients use: the way there, the work, and what speaks against a peer.

    Args:
        round_trip_s: measured or assumed seconds to a peer and back, by peer id.
        penalty_s: seconds added for each block at a peer, such as one that failed lately; far above all else,
            so that it is used only where no other server has the block.
        wait_s: seconds until a peer has room, by peer id; 0 for one that is not busy.
        tokens: rows x tokens that caches must hold soon; a server that announced less costs a little more.
        salt: this client's own; spreads clients over servers that are equally good.
        shown: what a peer has shown of its speed; see `claims.py`.
        best_s: seconds per block of the best of those that have shown anything; 0 = none has.
    """

    def cost(server: Announcement, start: int, stop: int) -> float:
        share = (stop - start) / (server.stop - server.start)
        work = share / max(server.throughput, 1e-3)
        claimed = round_trip_s(server.service_id) + work + server.expected_wait_s
        shown_s = shown(server.service_id)
        seconds = believed_s(claimed, work, stop - start, shown_s, best_s)
        crowded = 0.5 if server.free_cache_tokens < max(tokens, 1) else 0.0
        # Equal servers differ by their hash with this client: at most 10 % of the work, never zero.
        tie = (seconds if shown_s else work) * 0.1 * _unit_hash(salt + server.service_id) + 1e-9
        avoided = penalty_s(server.service_id) * (stop - start)  # so that every block that can is spared
        return seconds + tie + crowded + wait_s(server.service_id) + avoided

    return cost


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32
