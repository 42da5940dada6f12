"""Is it worth to go where an earlier session with the same beginning went? Pure.

Servers keep the keys and values of sessions that have ended, each for itself. A new session that begins alike
saves the time of its first tokens, but only over the very servers of the earlier one, which may be slower.
"""

from __future__ import annotations

_ANSWER_TOKENS = 64
"""How long an answer is taken to be: a slower route costs its delay for each token."""


def time_saved_s(shared_tokens: int, prompt_token_s: float, extra_token_s: float) -> float:
    """Seconds that a session saves on the route of an earlier one; below 0 if it loses.

    Args:
        shared_tokens: with which both begin, and which servers may have kept.
        prompt_token_s: seconds that a token of a prompt takes on the best other route.
        extra_token_s: by how much each token of the answer takes longer on the earlier one's route.
    """
    return shared_tokens * prompt_token_s - _ANSWER_TOKENS * extra_token_s
