"""What a simulated swarm assumes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SwarmAssumptions:
    """How long things take that are neither computing nor distance, and how servers hold caches.

    Attributes:
        relayed: outputs pass through the client, as in Petals' papers; else servers hand them on.
        overhead_s: of each visit of a token at a server.
        prompt_overhead_s: of each visit of a prompt.
        block_overhead_s: of a prompt in one block, besides its tokens.
        session_s: of beginning a session.
        batching: steps that wait at the same time run together, and prompts in pieces between them; else
            every session computes as if it were alone.
        paged: caches grow with their sessions; else a session takes all that it may need when it begins.
        cache_tokens: that a server's caches hold at most in each block; inf = what its memory allows.
        reserved_tokens: that a session takes then; 0 = as many as its prompt and answer have.
        announce_period_s, record_lifetime_s: of announcements.
        spread_s: within which an announcement is known to everybody.
        move_notice_s: for which a server tells the others that it means to move before it goes.
        look_period_s: mean time between two looks of a server at its placement; it looks at random times.
        silence_s: after which a server that does not answer counts as gone.
        load_bytes_per_s: of blocks that are fetched and loaded.
        notice_s: a server that goes tells so, and goes so many seconds later; None = it crashes.
    """

    relayed: bool = False
    overhead_s: float = 0.002
    prompt_overhead_s: float = 0.002
    block_overhead_s: float = 0.0
    session_s: float = 0.0
    batching: bool = False
    paged: bool = False
    cache_tokens: float = math.inf
    reserved_tokens: float = 0.0
    announce_period_s: float = 10.0
    record_lifetime_s: float = 30.0
    spread_s: float = 1.0
    move_notice_s: float = 2.0
    look_period_s: float = 60.0
    silence_s: float = 2.0
    load_bytes_per_s: float = 250e6
    notice_s: float | None = None
