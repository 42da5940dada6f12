"""How a batch is cut, and which server is given what next. Pure: numbers in, decisions out.

Work is counted in *units*: tokens (rows x tokens) times blocks.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping

from swarmkit.client.routing.route import Cost
from swarmkit.net.registry.records import Announcement

PER_SERVER = 4
"""Micro-batches for each server that can work: in a chain of n servers, m micro-batches take
(m + n - 1) / m times as long as if none ever waited for the one before it."""
LEAST_TOKENS = 64
"""Of a micro-batch: with fewer, a server spends its time on reading weights."""
MOST_TOKENS = 1024
"""Of a micro-batch, unless one row has more: it travels, waits and is done again as a whole."""

IN_FLIGHT = 2
"""Requests at one server at a time: one that is worked on, and one that is on its way."""


def micro_batches(rows: int, tokens: int, servers: int) -> list[tuple[int, int]]:
    """Rows [low, high) of each micro-batch; they are as equal as can be, and rows are never cut.

    Args:
        servers: how many could work at the same time.
    """
    wanted = max(1, PER_SERVER * servers)
    count = min(rows, wanted, max(1, rows * tokens // LEAST_TOKENS))
    most_rows = max(1, MOST_TOKENS // tokens)
    count = max(count, -(-rows // most_rows))
    cuts = [rows * part // count for part in range(count + 1)]
    return [(low, high) for low, high in zip(cuts, cuts[1:], strict=False)]  # noqa: RUF007


class Paces:
    """Seconds per unit of each server, in one direction, as measured; else as it claims.

    What servers announce is how fast they decode, which is slower than many tokens at a time. So claims are
    only compared with each other: a server that was never measured is taken for as much slower or faster than
    the measured ones as it says it is.
    """

    _WEIGHT = 0.5  # of a new measurement

    def __init__(self) -> None:
        self._measured: dict[str, float] = {}

    def observe(self, peer_id: str, units: int, seconds: float) -> None:
        """A server did so many units in so many seconds, in which it did nothing else of ours."""
        new, old = seconds / units, self._measured.get(peer_id)
        self._measured[peer_id] = new if old is None else old + self._WEIGHT * (new - old)

    def of(self, claims: Mapping[str, float]) -> dict[str, float]:
        """Args: claims: by peer id, the seconds per unit that each server announces."""
        known = [self._measured[peer] / claim for peer, claim in claims.items() if peer in self._measured]
        scale = statistics.median(known) if known else 1.0
        return {peer: self._measured.get(peer, scale * claim) for peer, claim in claims.items()}


def claimed_pace(server: Announcement) -> float:
    """Seconds per unit, as a server announces it."""
    return 1.0 / (max(server.throughput, 1e-3) * (server.stop - server.start))


def finish_cost(
    *,
    tokens: int,
    pace_s: Callable[[str], float],
    backlog_s: Callable[[str], float],
    round_trip_s: Callable[[str], float],
    penalty_s: Callable[[str], float],
    salt: str = "",
    kept_by: str = "",
) -> Cost:
    """The cost for `routing.find_route` with which a micro-batch is done as early as can be.

    As each takes what is then the earliest way, servers get shares in proportion to their paces.

    Args:
        tokens: rows x tokens of the micro-batch.
        pace_s: seconds per unit at a peer.
        backlog_s: seconds until a peer is through with what it was sent already.
        round_trip_s: seconds to a peer and back.
        penalty_s: seconds added for each block at a peer, such as one that failed lately.
        salt: this client's own; spreads clients over servers that are equally good.
        kept_by: the peer that may have half of the work behind it; everybody else does all of it.
    """

    def cost(server: Announcement, start: int, stop: int) -> float:
        peer = server.service_id
        work = tokens * (stop - start) * pace_s(peer) * (2 if kept_by and peer != kept_by else 1)
        tie = work * 0.01 * _unit_hash(salt + peer) + 1e-9
        return round_trip_s(peer) + backlog_s(peer) + work + tie + penalty_s(peer) * (stop - start)

    return cost


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32
