"""Is it quicker to bring keys and values to another server, or to have that one compute them again? Pure."""

from __future__ import annotations

from dataclasses import dataclass

ASSUMED_BYTES_PER_S = 12.5e6
"""What a link carries that was not measured: 100 Mbit/s."""
_ROUND_TRIPS = 4
"""Of a handover, with each of the two servers: streams are opened, both are asked, and both confirm."""
_PATIENCE = 4.0
LEAST_PATIENCE_S = 10.0
_MOST_PATIENCE_S = 120.0


@dataclass(frozen=True)
class HandoverFacts:
    """What is known of a session's part on a server that leaves, and of the server that takes its place.

    Attributes:
        size: rows x tokens that the session holds.
        kv_bytes: of the keys and values of one of them, in all blocks.
        hidden_bytes: of the hidden state of one of them, as it travels.
        prompt_token_s: for which the new server computes one of them.
        old_way_s, new_way_s: from the client to the old and to the new server and back.
        to_new, from_new, from_old, between: bytes per second from the client to the new server, from the new
            and the old server to the client, and from the old to the new one; None = not measured.
    """

    size: int
    kv_bytes: int
    hidden_bytes: int
    prompt_token_s: float
    old_way_s: float
    new_way_s: float
    to_new: float | None = None
    from_new: float | None = None
    from_old: float | None = None
    between: float | None = None


def replay_s(facts: HandoverFacts) -> float:
    """Seconds to send all inputs to the new server, have them computed, and get the outputs back."""
    up = facts.to_new or ASSUMED_BYTES_PER_S
    down = facts.from_new or ASSUMED_BYTES_PER_S
    sent_s = facts.size * facts.hidden_bytes * (1 / up + 1 / down)
    return facts.new_way_s + sent_s + facts.size * facts.prompt_token_s


def handover_s(facts: HandoverFacts) -> float:
    """Seconds to have the old server bring keys and values to the new one.

    Where the link between them is not measured, it is taken for the slower one of what the old server sends
    to the client, and of what the client sends to the new server.
    """
    known = [rate for rate in (facts.from_old, facts.to_new) if rate]
    rate = facts.between or min(known, default=ASSUMED_BYTES_PER_S)
    return _ROUND_TRIPS * (facts.old_way_s + facts.new_way_s) + facts.size * facts.kv_bytes / rate


def is_handover_quicker(facts: HandoverFacts) -> bool:
    """Whether keys and values are to be handed over."""
    return facts.kv_bytes > 0 and handover_s(facts) < replay_s(facts)


def patience_s(facts: HandoverFacts) -> float:
    """Seconds after which a handover that was begun is given up, and the session is replayed."""
    return min(max(_PATIENCE * handover_s(facts), LEAST_PATIENCE_S), _MOST_PATIENCE_S)
