"""How long will a token take over a route, where does the time go, and what would change it? Pure.

A token passes through servers 1 … n. With direct ways from server to server it is here after::

    r₁/2 + w₁ + l₁₂/2 + w₂ + … + wₙ + rₙ/2            w = queue + compute, r = round trip client ↔ server,
                                                       l = round trip server ↔ server
and else after the sum of rᵢ + wᵢ. The client also waits for the output of each server on the way, which it
keeps; that can be later only where a server is much farther from the client than from the next server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

PartKind = Literal["way", "queue", "compute", "client"]


@dataclass(frozen=True)
class HopFacts:
    """What is known of one server of a route.

    Attributes:
        peer_id, label: of the server.
        start, stop: the blocks [start, stop) that it runs.
        round_trip_s: from the client to the server and back, with what both add to a message.
        compute_s: of one token through its blocks.
        queue_s: for which a token waits there.
        prompt_token_s: of each token of a prompt through its blocks.
        open_s: to reach it and open a session there.
        measured: whether this client has measured all this, and does not repeat what the server says.
    """

    peer_id: str
    label: str
    start: int
    stop: int
    round_trip_s: float
    compute_s: float
    queue_s: float = 0.0
    prompt_token_s: float = 0.0
    open_s: float = 0.0
    measured: bool = False

    @property
    def work_s(self) -> float:
        return self.queue_s + self.compute_s


@dataclass(frozen=True)
class ForecastPart:
    """One part of a token's time: `where` is a server's label, two labels for a way, or the client."""

    kind: PartKind
    where: str
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a client can expect of a route.

    Attributes:
        token_s: of each token after the first one.
        first_token_s: until the first token of a new session, to open it included.
        parts: where `token_s` goes, in order.
    """

    token_s: float
    first_token_s: float
    parts: tuple[ForecastPart, ...]

    @property
    def tokens_per_s(self) -> float:
        return 1.0 / max(self.token_s, 1e-9)

    @property
    def bottleneck(self) -> ForecastPart:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: part.seconds)


Links = Mapping[tuple[str, str], float]
"""Round trips in seconds from one server to another, by their peer ids, as far as known."""


def link_s(before: HopFacts, following: HopFacts, links: Links) -> float:
    """The round trip between two servers.

    Where it is not known it is taken for the longer of those from the client to either: the middle of what
    the triangle inequality allows, |a - b| to a + b.
    """
    known = links.get((before.peer_id, following.peer_id))
    return max(before.round_trip_s, following.round_trip_s) if known is None else known


def forecast(
    hops: Sequence[HopFacts], links: Links, *, push: bool = True, prompt_tokens: int = 128, own_s: float = 0.0
) -> Forecast:
    """What to expect of a route.

    Args:
        push: whether servers hand outputs on to each other.
        own_s: what the client computes for each token: embeddings, output layer, sampling.
    """
    parts = [ForecastPart("client", "this client", own_s)] if own_s else []
    parts += _ways_and_work(hops, links, push)
    token_s = sum(part.seconds for part in parts)
    if push:
        token_s = max(token_s, own_s + _latest_output_s(hops, links))
    prompt_s = sum(prompt_tokens * hop.prompt_token_s - hop.compute_s for hop in hops)
    return Forecast(token_s, _opening_s(hops, links, push) + token_s + prompt_s, tuple(parts))


def _ways_and_work(hops: Sequence[HopFacts], links: Links, push: bool) -> list[ForecastPart]:
    parts: list[ForecastPart] = []
    for index, hop in enumerate(hops):
        if not push:
            parts.append(ForecastPart("way", f"client - {hop.label}", hop.round_trip_s))
        elif index == 0:
            parts.append(ForecastPart("way", f"client - {hop.label}", hop.round_trip_s / 2))
        else:
            before = hops[index - 1]
            name = f"{before.label} - {hop.label}"
            parts.append(ForecastPart("way", name, link_s(before, hop, links) / 2))
        if hop.queue_s:
            parts.append(ForecastPart("queue", hop.label, hop.queue_s))
        parts.append(ForecastPart("compute", hop.label, hop.compute_s))
    if push and hops:
        parts.append(ForecastPart("way", f"{hops[-1].label} - client", hops[-1].round_trip_s / 2))
    return parts


def _latest_output_s(hops: Sequence[HopFacts], links: Links) -> float:
    """When the output of the server whose output comes last is here."""
    latest = passed = 0.0
    for index, hop in enumerate(hops):
        way_s = hop.round_trip_s if index == 0 else link_s(hops[index - 1], hop, links)
        passed += way_s / 2 + hop.work_s
        latest = max(latest, passed + hop.round_trip_s / 2)
    return latest


def _opening_s(hops: Sequence[HopFacts], links: Links, push: bool) -> float:
    """To open a session at all servers: at once where they are then linked, else one after the other."""
    if not push or len(hops) < 2:
        return sum(hop.open_s for hop in hops)
    # Each server looks up where the next one can be dialled, dials it as the client did, over another way,
    # and asks for the session.
    linking = [
        before.round_trip_s + link_s(before, hop, links) * (1 + hop.open_s / max(hop.round_trip_s, 1e-6))
        for before, hop in pairwise(hops)
    ]
    return max(hop.open_s for hop in hops) + max(linking)


@dataclass(frozen=True)
class OneMore:
    """What another server would bring: as fast and as near as the best here, with blocks [start, stop)."""

    start: int
    stop: int
    forecast: Forecast


def one_more(hops: Sequence[HopFacts], links: Links, most_blocks: int, present: Forecast) -> OneMore | None:
    """The blocks with which one more server would shorten a token's time most; None if none would.

    Args: most_blocks: that a server here holds.
    """
    best: OneMore | None = None
    if not hops:
        return None
    per_block_s = min(hop.compute_s / (hop.stop - hop.start) for hop in hops)
    prompt_s = min(hop.prompt_token_s / (hop.stop - hop.start) for hop in hops)
    nearest = min(hops, key=lambda hop: hop.round_trip_s)
    first, last = hops[0].start, hops[-1].stop
    own = [part for part in present.parts if part.kind == "client"]
    push = any(part.kind == "way" and part.where.endswith("- client") for part in present.parts)
    width = min(most_blocks, last - first)
    for start in range(first, last - width + 1):
        stop = start + width
        new = HopFacts(
            "", "one more", start, stop, nearest.round_trip_s, per_block_s * width, 0.0, prompt_s * width,
            nearest.open_s,
        )  # fmt: skip
        before = [_clipped(hop, hop.start, min(hop.stop, start)) for hop in hops if hop.start < start]
        after = [_clipped(hop, max(hop.start, stop), hop.stop) for hop in hops if hop.stop > stop]
        found = forecast([*before, new, *after], links, push=push, own_s=sum(part.seconds for part in own))
        if best is None or found.token_s < best.forecast.token_s:
            best = OneMore(start, stop, found)
    return best if best is not None and best.forecast.token_s < present.token_s else None


def _clipped(hop: HopFacts, start: int, stop: int) -> HopFacts:
    share = (stop - start) / (hop.stop - hop.start)
    return replace(
        hop,
        start=start,
        stop=stop,
        compute_s=hop.compute_s * share,
        prompt_token_s=hop.prompt_token_s * share,
    )
