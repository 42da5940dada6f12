"""Which servers are tried at once, in which order, and when? Pure.

A trial is a step of one token at a server that has not worked for this client yet. Trials begin only where a
server that is needed now does not answer, or where two have failed. They begin two by two, and soon at many
servers: among fifty strangers and two servers the first that works is found after a few rounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from swarmkit.net.registry.records import Announcement

ROUND_S = 0.3
"""The time between two rounds of trials, unless all trials have ended before."""
TRIAL_S = 20.0
"""A trial that takes longer has failed. It holds up no other one, and ends with the search at the latest."""
MOST_TRIALS = 512
"""In one search for servers that work."""
MOST_TRIALS_FOR_BETTER = 32
"""In one search for servers that are faster than those in use."""
_FIRST_ROUND = 2
_LARGEST_ROUND = 64


def patience_s(untried_wait_s: float, size: int, throughput: float) -> float:
    """How long a server that has never worked is waited for before others are tried.

    Args:
        untried_wait_s: `DeadlineSettings.untried_wait_s`.
        size: rows x tokens of the step; 0 = a request that computes nothing.
        throughput: tokens per second that the server claims.
    """
    return untried_wait_s + size / max(throughput, 1e-3)


def rounds() -> Iterator[int]:
    """How many trials begin in each round."""
    number = _FIRST_ROUND
    while True:
        yield number
        number = min(2 * number, _LARGEST_ROUND)


def order_of_trials(servers: Sequence[Announcement], salt: str) -> list[Announcement]:
    """The order in which servers are tried: by what they claim, and by chance, in turns.

    Where claims are true the fastest are found first, and where many are false they keep none away for long.
    """
    by_claim = sorted(
        servers, key=lambda each: (-each.throughput * (each.stop - each.start), each.service_id)
    )
    by_chance = sorted(servers, key=lambda each: _digest(salt + each.service_id))
    pairs = zip(by_chance, by_claim, strict=True)
    return list({each.service_id: each for pair in pairs for each in pair}.values())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
